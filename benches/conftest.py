"""Keeps committed pytest-benchmark files small, and free of the machine's name."""

import torch

from fastmem import _system


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(cpu=_system.cpu_name(), gpu=_system.gpu_name(), threads=torch.get_num_threads())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.clear()
    commit_info["id"] = _system.git_commit()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row.pop("params", None)  # the repr of a whole Group
        row["param"] = None


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """Groups by `benchmark.group` alone, in the order of the files."""
    groups = {}
    for bench in benchmarks:
        groups.setdefault(bench["group"], []).append(bench)
    return list(groups.items())
