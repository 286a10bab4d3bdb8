"""Prints the metadata of a checkpoint's arrays as JSON: python read_declared.py DIRECTORY BYTES.

This is a separate program that imports nothing of moe_jax.  TensorStore decompresses the index of a
step without a size limit, so the program runs with at most BYTES of memory, and may be killed.
"""

import json
import resource
import sys

MAX_ARRAYS = 2**18  # arrays of a step
_METADATA = ".zarray"
_FIELDS = ("shape", "chunks", "dtype", "compressor", "filters")


def main() -> None:
    """Print one JSON object: name of an array -> its metadata fields."""
    directory, limit = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import tensorstore as ts  # after the limit

    # The stack of each thread counts towards the limit.
    context = {name: {"limit": 2} for name in ("data_copy_concurrency", "file_io_concurrency")}
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    store = ts.KvStore.open(spec | {"context": context}).result()
    keys = store.list().result()
    if any(key.endswith(b"zarr.json") for key in keys):
        sys.exit("it holds arrays of zarr 3; runs write zarr 2")
    names = [key for key in keys if key.endswith(f"/{_METADATA}".encode())]
    if len(names) > MAX_ARRAYS:
        sys.exit(f"it holds more than {MAX_ARRAYS} arrays")
    found = {}
    for key in names:
        metadata = json.loads(store.read(key).result().value)
        name = key.decode().removesuffix(f"/{_METADATA}")
        found[name] = {field: metadata.get(field) for field in _FIELDS}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # damaged bytes may raise anything
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:300])
