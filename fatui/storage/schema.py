"""The JSON Schema of result files, generated from the types of a report.

`python -m fatui.storage.schema` writes it to the package again, after a change of the types.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from attention.core.results import SCHEMA, Report

PUBLISHED: Final = Path(__file__).with_name("result.schema.json")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
STUDY: Final = "The original study's figures beside the measured ones, for the shapes that it has."


def result_schema() -> dict[str, Any]:
    """Return the schema of a result file, JSON Schema draft 2020-12."""
    made = msgspec.json.schema(Report)
    report = made["$defs"]["Report"]
    report["properties"]["schema"]["maximum"] = SCHEMA
    report["properties"]["study"] = {"description": STUDY, "type": ["object", "null"]}
    title = "Results of fatui"
    return {"$schema": DIALECT, "$id": f"urn:fatui:result:{SCHEMA}", "title": title, **made}


def schema_text() -> str:
    """Return the schema as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(result_schema(), order="deterministic"), indent=2).decode() + "\n"


if __name__ == "__main__":
    PUBLISHED.write_text(schema_text(), encoding="utf-8")
