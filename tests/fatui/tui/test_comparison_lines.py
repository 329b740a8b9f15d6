"""The lines of the comparison table, without a screen."""

from attention.core.results import Case, Row, Summary
from attention.core.workload import Workload
from fatui.tui.view_models.table_lines import block_head, summary_lines


def test_the_head_of_a_case_names_another_reference():
    rows = (Row(implementation="baseline", status="failed"), Row(implementation="mlx", status="ok"))
    case = Case(workload=Workload(), reference="mlx", rows=rows)
    assert "baseline failed: speedups are relative to mlx" in block_head(0, case).span


def test_one_complete_case_is_one_case():
    case = Case(workload=Workload(), reference="mlx")
    head, line = summary_lines((Summary(implementation="poc", cases=1),), [case])
    assert head.span == "Speedups over mlx, geometric mean of 1 complete case"
    assert line.cells["path"] == "1 case"
