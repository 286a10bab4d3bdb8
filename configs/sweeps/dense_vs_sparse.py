"""Dense against sparse at equal FLOPs a token: `tiny:dense`, and `tiny` with 8 and 32 experts.

Paper: the question of Switch Transformers (arXiv 2101.03961), section 3.1: what do parameters buy
  that cost no FLOPs?
Cost: 6 runs of 150 steps of 4,096 bytes, 1 to 4 minutes each on 2 CPU cores.
Expected: the README's section Sweeps shows the outcome.
Command: python -m launch.sweep --sweep=configs/sweeps/dense_vs_sparse.py --workdir=runs/dense

Groups of 8 rows give each of 32 experts 64 tokens on average; the single rows of `tiny` would give
it 8, and the drops would decide the comparison.  Dense and sparse differ in FLOPs by the router.
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
