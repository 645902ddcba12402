"""Stands for `gh`, GitHub's command line, as .github/workflows/pull-request.yml calls it: comments are in $COMMENTS."""

import json
import os
import re
import sys
from pathlib import Path

comments = Path(os.environ["COMMENTS"])
kept = json.loads(comments.read_text())
options = dict(zip(sys.argv, sys.argv[1:], strict=False))
if sys.argv[1:3] == ["pr", "comment"]:
    body = Path(options["--body-file"]).read_text()
    kept.append({"id": 100 + len(kept), "login": "github-actions[bot]", "body": body})
elif options.get("--method") == "PATCH":
    number = int(next(word for word in sys.argv if "/issues/comments/" in word).rpartition("/")[2])
    (one,) = [one for one in kept if one["id"] == number]
    one["body"] = Path(options["--field"].removeprefix("body=@")).read_text()
else:
    chosen = re.fullmatch(
        r'\.\[\] \| select\(\.user\.login == "(.+)" and \(\.body \| startswith\("(.+)"\)\)\) \| \.id', options["--jq"]
    )
    for one in kept:
        if one["login"] == chosen[1] and one["body"].startswith(chosen[2]):
            print(one["id"])
comments.write_text(json.dumps(kept))
