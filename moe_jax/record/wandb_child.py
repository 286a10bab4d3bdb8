"""Forwards its standard input to Weights & Biases; `wandb_tracker.py` starts it as a process.

Standard input has lines of JSON: first the arguments of `wandb.init`, then `{"row": ...}`,
`{"texts": ...}` and, at the end of the run, `{"end": EXIT_CODE}`.  Lines for the log go to standard
output.  The program imports neither moe_jax nor JAX.
"""

import json
import os
import pathlib
import sys
import threading
import time

CLOSE_TIMEOUT = 60.0  # seconds to finish after the trainer was killed


def main() -> int:
    """Read to the end of standard input and return the exit code."""
    lines, say = sys.stdin.buffer, os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # other output must not get into the log
    threading.Thread(target=_end_after_parent, args=[os.getppid()], daemon=True).start()
    start = json.loads(lines.readline())
    try:
        import wandb  # pyright: ignore[reportMissingImports]

        settings = wandb.Settings(console="off", silent=True)
        run = wandb.init(**start, settings=settings, resume="allow")
        # This is a link to wandb's cache, and a workdir with links that leave it is refused.
        pathlib.Path(run.dir, "..", "logs", "debug-core.log").unlink(missing_ok=True)
        # The run's own step, because wandb's cannot decrease when a run is resumed or rewound.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        say.write(f"wandb: {run.url or run.dir}\n")
        code = 1  # the trainer was killed, unless the last line has an exit code
        for line in lines:
            record = json.loads(line)
            if "row" in record:
                run.log(record["row"])
            elif "texts" in record:
                step, name, text = record["texts"]
                table = wandb.Table(columns=["step", "text"], data=[[step, text]])
                run.log({"step": step, name: table})
            elif "end" in record:
                code = record["end"]
        run.finish(exit_code=code)
    except Exception as error:  # wandb raises many types
        say.write(f"wandb failed ({type(error).__name__}: {_one_line(error)}).\n")
        return 1
    return 0


def _end_after_parent(parent: int) -> None:
    """End this process CLOSE_TIMEOUT seconds after the trainer, even if wandb hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(CLOSE_TIMEOUT)
    os._exit(1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # wandb's exit hooks may wait for the network
