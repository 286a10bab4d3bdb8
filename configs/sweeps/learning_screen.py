"""Screening for docs/learning.md: dense, numbers of experts, routers, and why `switch` collapses.

Paper: Switch Transformers, arXiv 2101.03961, sections 2.2 and 2.4 (initialisation, jitter).
Cost: 24 runs of 65.5M tokens, each about a minute of one H200.
Expected: docs/learning.md shows the outcome.
Command: python -m launch.sweep --sweep=configs/sweeps/learning_screen.py --workdir=runs/screen
"""

MOE = "config.model.moe"
# Each differs from `SWITCH` in one cause.
SWITCH = {f"{MOE}.router": "switch", f"{MOE}.balance_scope": "group", f"{MOE}.balance_weight": 0.01}
CAUSES = [
    {},
    {f"{MOE}.options.switch.jitter": 0.0},
    {f"{MOE}.z_weight": 0.0},
    {f"{MOE}.balance_layers": "sum"},
    {f"{MOE}.options.switch.init_std": 0.0},
    {f"{MOE}.expert_init_scale": 0.316},
    {"config.optimizer.rate_of.router": 0.1},
    {f"{MOE}.first_dense": 1},
    {f"{MOE}.every": 2},
    {f"{MOE}.balance_scope": "global", f"{MOE}.balance_weight": 0.1},
    {f"{MOE}.dispatch": "capacity"},
]


def get_hyper(hyper):
    shapes = ["dense", "e8k2", "e64k2", "e32k2", "e64k8", "e8k1", "e32k1", "e64k1"]
    balance = {f"{MOE}.balance_scope": "group", f"{MOE}.balance_weight": 0.01}
    routers = [
        {"config": "configs/learning.py:e64k2", f"{MOE}.router": name, **balance}
        for name in ("top_k", "gshard")
    ]
    routers.append(
        {
            "config": "configs/learning.py:e64k2",
            f"{MOE}.router": "noisy_top_k",
            f"{MOE}.balance_scope": "group",
            f"{MOE}.balance_weight": 0.1,  # its paper's w
        }
    )
    switch = [{"config": "configs/learning.py:e64k1", **SWITCH, **cause} for cause in CAUSES]
    small = [{"config": f"configs/learning.py:e{E}k1", **SWITCH} for E in (8, 32)]
    runs = [*hyper.sweep("config", [f"configs/learning.py:{shape}" for shape in shapes])]
    return hyper.chainit([runs, routers, switch, small])
