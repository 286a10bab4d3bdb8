"""Learning rates from 0.5e-3 to 8e-3 for the sparse model and its dense twin.

Paper: none.  Two models should be compared each at its own best learning rate.
Cost: 10 runs of 200 steps of 4,096 bytes, about 3 minutes each on 2 CPU cores.
Command: python -m launch.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/rate
Plot: python -m moe_jax results --workdir=runs/rate --plot=rate.png --x=optimizer.learning_rate
"""


def get_hyper(hyper):
    return hyper.product(
        [
            hyper.sweep("config", ["configs/tiny.py", "configs/tiny.py:dense"]),
            hyper.sweep("config.optimizer.learning_rate", [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]),
        ]
    )
