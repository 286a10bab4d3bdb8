"""Experts x granularity at equal active FLOPs: many narrow experts against few wide ones.

Paper: Scaling Laws for Fine-Grained Mixture of Experts (arXiv 2402.07871): granularity G cuts every
  expert into G of 1/G of its width and asks for G times as many; parameters and FLOPs stay.
Cost: 6 runs of 200 steps of 4,096 bytes, 3 to 8 minutes each on 2 CPU cores.
Command: python -m launch.sweep --sweep=configs/sweeps/granularity.py --workdir=runs/granularity
Plot: python -m moe_jax results --workdir=runs/granularity --plot=granularity.png

SIZES are the experts at G = 1, where a token goes to two of them; only the router
grows with G.  A routing group keeps its tokens an expert, as K and E grow alike.
"""

SIZES = (8, 32)  # experts at G = 1
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
