"""`keysync doctor`."""

from __future__ import annotations

import json

from keysync_jax.cli.verbs import add_verb

_MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


def add_doctor(verbs) -> None:
    """Add `keysync doctor`."""
    p = add_verb(
        verbs, "doctor", _doctor, "say whether this machine can dub, and what to do where it cannot",
        "  keysync doctor --model DIR --output dubbed/",
    )  # fmt: skip
    p.add_argument("--model", metavar="DIR", help="model directory to look at, or demo")
    p.add_argument("--output", default=".", metavar="DIR", help="folder for outputs, whose disk is looked at (default: this one)")
    p.add_argument("--json", action="store_true", help="machine-readable")


def _doctor(args) -> int:
    from keysync_jax.planning.doctor import BAD, diagnose

    findings = []
    for finding in diagnose(args.model, args.output):
        findings.append(finding)
        if not args.json:
            print(f"{_MARKS[finding.state]}  {finding.what:<15} {finding.found}", flush=True)
            if finding.fix:
                print(f"{'':22}-> {finding.fix}", flush=True)
    bad = [finding for finding in findings if finding.state == BAD]
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    elif bad:
        print(f"a dub cannot run here: {len(bad)} problem(s), see the lines with ->")
    else:
        print("a dub can run here")
    return 1 if bad else 0
