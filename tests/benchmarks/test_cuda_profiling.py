"""Parsing of Nsight Compute's tables; needs no GPU."""

import pytest

pytest.importorskip("mlx.core")

from benchmarks.cuda.profiling import last_launch

PRINTED = """==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","flash_forward","GPU Speed Of Light Throughput","Duration","us","12.50"
"1","flash_forward","GPU Speed Of Light Throughput","Duration","us","11.25"
"1","flash_forward","Compute Workload Analysis","SM Busy","%","78.1"
"""


def test_the_last_launch_counts_as_those_before_it_warm_up():
    assert last_launch(PRINTED) == {"Duration": "11.25 us", "SM Busy": "78.1 %"}


def test_a_call_that_launched_none_of_our_kernels_is_reported():
    with pytest.raises(RuntimeError, match="saw no launch"):
        last_launch("==WARNING== No kernels were profiled.")
