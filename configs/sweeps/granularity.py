"""Experts x granularity at equal active FLOPs: many narrow experts against few wide ones.

Paper: Scaling Laws for Fine-Grained Mixture of Experts (arXiv 2402.07871): granularity G splits
  every expert into G experts of 1/G its width, and a token uses G times as many of them.  The
  numbers of parameters and FLOPs stay the same.
Cost: 6 runs of 200 steps of 4,096 bytes, 3 to 8 minutes each on 2 CPU cores.
Command: python -m launch.sweep --sweep=configs/sweeps/granularity.py --workdir=runs/granularity
Plot: python -m moe_jax results --workdir=runs/granularity --plot=granularity.png

SIZES are the numbers of experts at G = 1, where a token uses two of them.  Only the router grows
with G.  The balanced load S·K/E stays the same, because K and E grow by the same factor.
"""

SIZES = (8, 32)  # numbers of experts at G = 1
GRANULARITIES = (1, 2, 4)


def get_hyper(hyper):
    def cut(experts):
        return hyper.zipit(
            [
                hyper.sweep("config.model.moe.num_experts", [experts * g for g in GRANULARITIES]),
                hyper.sweep("config.model.moe.top_k", [2 * g for g in GRANULARITIES]),
                hyper.sweep("config.model.moe.expert_width", [256 // g for g in GRANULARITIES]),
            ]
        )

    return hyper.product(
        [
            hyper.fixed("config", "configs/tiny.py"),
            hyper.fixed("config.model.moe.group_rows", 8),
            hyper.chainit([cut(experts) for experts in SIZES]),
        ]
    )
