"""Capacity factor x router: what do dropped tokens cost each router?

Paper: Switch Transformers (arXiv 2101.03961), table 1 (capacity 1.0, 1.25, 2.0), and GShard
  (arXiv 2006.16668), which drops the random second choice rather than the token.
Cost: 9 runs of 200 steps of 4,096 bytes, about 3 minutes each on 2 CPU cores.
Command: python -m launch.sweep --sweep=configs/sweeps/capacity.py --workdir=runs/capacity
Plot: python -m moe_jax results --workdir=runs/capacity --plot=capacity.png \
  --x=model.moe.capacity_factor

Switch sends a token to one expert, so its experts are twice as wide: equal FLOPs a token.
"""


def get_hyper(hyper):
    routers = hyper.zipit(
        [
            hyper.sweep("config.model.moe.router", ["switch", "gshard", "top_k"]),
            hyper.sweep("config.model.moe.top_k", [1, 2, 2]),
            hyper.sweep("config.model.moe.expert_width", [512, 256, 256]),
        ]
    )
    return hyper.product(
        [
            hyper.fixed("config", "configs/tiny.py"),
            routers,
            hyper.sweep("config.model.moe.capacity_factor", [1.0, 1.25, 2.0]),
        ]
    )
