"""Dense against sparse at equal FLOPs per token: `tiny:dense`, and `tiny` with 8 and 32 experts.

Paper: Switch Transformers (arXiv 2101.03961), section 3.1, asks how much parameters that cost no
  FLOPs improve the loss.
Cost: 6 runs of 150 steps of 4,096 bytes, 1 to 4 minutes each on 2 CPU cores.
Expected: docs/sweeps.md shows the outcome.
Command: python -m launch.sweep --sweep=configs/sweeps/dense_vs_sparse.py --workdir=runs/dense

With routing groups of 8 rows each of 32 experts gets 64 assignments on average.  With the groups of
one row in `tiny` it would get 8, and dropped assignments would decide the comparison.  The sparse
models need the router's FLOPs in addition.
"""


def get_hyper(hyper):
    dense = hyper.fixed("config", "configs/tiny.py:dense")
    sparse = hyper.product(
        [
            hyper.fixed("config", "configs/tiny.py"),
            hyper.sweep("config.model.moe.num_experts", [8, 32]),
            hyper.fixed("config.model.moe.group_rows", 8),
        ]
    )
    return hyper.product(
        [
            hyper.sweep("config.seed", [0, 1]),
            hyper.chainit([dense, sparse]),
            hyper.fixed("config.train.steps", 150),
            hyper.fixed("config.eval.every", 25),
        ]
    )
