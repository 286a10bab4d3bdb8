"""Capacity factor x router: how much loss do dropped assignments cost each router?

Paper: Switch Transformers (arXiv 2101.03961), table 1 (capacity 1.0, 1.25, 2.0), and GShard
  (arXiv 2006.16668), which samples second assignments and gives first ones priority.
Cost: 9 runs of 200 steps of 4,096 bytes, about 3 minutes each on 2 CPU cores.
Command: python -m launch.sweep --sweep=configs/sweeps/capacity.py --workdir=runs/capacity
Plot: python -m moe_jax results --workdir=runs/capacity --plot=capacity.png \
  --x=model.moe.capacity_factor

Switch routes each token to one expert, so its experts are twice as wide: equal FLOPs per token.
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
