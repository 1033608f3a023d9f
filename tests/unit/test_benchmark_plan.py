"""What planning an epoch takes: the figures are there, and stay within what is promised of memory."""

from __future__ import annotations

import json

from fastlt import cli


def test_each_number_of_records_has_a_row_for_each_sampling(capsys):
    words = ["--records", "1000", "300000", "--processes", "2", "--rounds", "1", "--json"]
    assert cli.main(["benchmark", "plan", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["records"], row["sampling"]) for row in rows] == [
        (records, sampling) for records in (1000, 300_000) for sampling in ("instance", "class_balanced")
    ]
    for row in rows[2:]:
        assert row["seconds"] > 0
        assert 5.9 < row["kept"] < 6.1  # half of 4 bytes for the position and 8 for the rectangle
        assert row["kept"] < row["peak"] < 64
