"""Print the seconds of each test file as JSON, read from pytest's `--junitxml`; `make durations` writes the file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from xml.etree import ElementTree


def main() -> None:
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        seconds[case.attrib["classname"].replace(".", "/") + ".py"] += float(case.attrib["time"])
    rounded = {file: round(total, 1) for file, total in seconds.most_common()}
    print(json.dumps(rounded, indent=0))


if __name__ == "__main__":
    main()
