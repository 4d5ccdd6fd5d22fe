"""
What decode results say together: ratios at the same context and batch, and lines fitted.

    python bench/compare.py decode.json transformers.json

Files of bench/decode.py and bench/transformers_decode.py, as many as there are, whole or cut. They
must be of one machine, shape and dtype. bench/decode.py prints the same at its end, of what it has
measured and of the files that --transformers names.
"""

import argparse
import statistics

import common  # noqa: F401  (it puts the project on the path)

from checkpoint import InputError, read_json, run_script


def kind_of(data):
    """What must be the same in the parsed results files that are compared."""
    settings = data.get("settings", {})
    kind = {key: settings.get(key) for key in ("shape", "layers", "dtype")}
    return {**kind, "gpu": data.get("gpu")}


def read_results(files, kind=None):
    """(step rows, rows of transformers) of results files. Raises InputError if they are not of one
    kind, that which is given or the first file's."""
    steps = []
    theirs = []
    for file in files:
        data = read_json(file)
        kind = kind or kind_of(data)
        if kind_of(data) != kind:
            raise InputError(f"{file}: its results are of {kind_of(data)}, not of {kind}; compare "
                             f"like with like")
        steps += data.get("steps", [])
        theirs += data.get("transformers", [])
    return steps, theirs


def batch_of(row):
    """What makes rows comparable: the batch, or that it is the largest in the same memory."""
    return "largest" if "largest" in row else row["batch"]


def compare(steps, theirs):
    """Print the ratios of step rows to the best row of transformers and to the dense model, adding
    them to the rows, and the lines fitted. Returns {engine and batch: line}."""
    for row in steps:
        says = f"{row['engine']}, CR {row['cr']:g}, {row['context']} x {row['batch']}:"
        speed = row["tokens_per_second"]
        same = [other for other in theirs
                if (other["context"], other["batch"]) == (row["context"], batch_of(row))]
        if same:
            best = max(same, key=lambda other: other["tokens_per_second"])
            row["over_transformers"] = speed / best["tokens_per_second"]
            print(f"{says} {row['over_transformers']:.2f} times the tokens/s of {best['engine']}")
        dense = dense_row(steps, row)
        if dense and row["cr"] > 1:
            row["over_dense"] = speed / dense["tokens_per_second"]
            where = " in the same memory" if "largest" in row else ""
            print(f"{says} {row['over_dense']:.2f} times the tokens/s of dense x {dense['batch']}"
                  f"{where}")
    return fit_lines(steps)


def dense_row(steps, row):
    """The row of the dense model that a row is to be compared with, None if it is not there."""
    kind = (row["engine"], row["context"], batch_of(row))
    for other in steps:
        if other["cr"] == 1 and (other["engine"], other["context"], batch_of(other)) == kind:
            return other
    return None


def fit_lines(steps):
    """Seconds against pairs, for every engine and batch that has three rows or more."""
    groups = {}
    for row in steps:
        if "largest" not in row:
            groups.setdefault(f"{row['engine']}, batch {row['batch']}", []).append(row)
    fits = {}
    for name, rows in groups.items():
        if len({row["pairs"] for row in rows}) > 2:
            fits[name] = fit = linear_fit(rows)
            print(f"{name}: seconds = {fit['fixed_seconds']:.4f} + {fit['seconds_per_pair']:.3e} x "
                  f"pairs, R^2 = {fit['r_squared']:.4f}")
    return fits


def linear_fit(rows):
    """Seconds against pairs, least squares."""
    pairs = [float(row["pairs"]) for row in rows]
    seconds = [row["seconds"] for row in rows]
    slope, fixed = statistics.linear_regression(pairs, seconds)
    r_squared = statistics.correlation(pairs, seconds) ** 2
    return {"fixed_seconds": fixed, "seconds_per_pair": slope, "r_squared": r_squared}


def main():
    p = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    p.add_argument("files", nargs="+")
    compare(*read_results(p.parse_args().files))


if __name__ == "__main__":
    run_script(main)
