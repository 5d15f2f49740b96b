"""Runs vmkeep and its peers on the same work: run.py [PART...]; scripts/bench says what the parts are."""

import argparse
import os
import shutil
import sys
import tempfile

import report
import works
from lab import Domain, Lab
from meter import Results, say
from tools import Vmkeep, VmkeepFile, peers

PARTS = ["history", "live"]


def history(options, results, lab, folder):
    work = works.History(options.data, results)
    found, missing = peers(folder, options.tools)
    for text in missing:
        say(f"left out: {text}")
    domain = Domain(lab, options.data, folder)
    tools = [Vmkeep(folder, options.vmkeep, domain), VmkeepFile(folder, options.vmkeep), *found]
    if options.tools:
        tools = [tool for tool in tools if tool.name in options.tools]
    else:
        results.forget(work.WORKS + ["limits"])
    results.facts["versions"] = {**results.facts.get("versions", {}), **{tool.name: tool.version() for tool in tools}}
    results.facts["data"] = {"fleet": work.fleet, "steps": work.steps, "virtual": os.path.getsize(work.image("db.T0"))}
    if not options.tools or "limits" in options.tools:
        results.facts["fixed"] = works.fixed_blocks(work, folder)
    for number in range(options.rounds):
        if not options.tools or "limits" in options.tools:
            works.Limits(work, folder).run(number)
        # each round begins with another one, so that nobody is always the first
        turn = number % max(len(tools), 1)
        for tool in tools[turn:] + tools[:turn]:
            work.run(tool, number)
    domain.remove()


def live(options, results, lab, folder):
    results.forget(works.Live.WORKS)
    works.Live(lab, Vmkeep(folder, options.vmkeep), folder, results, options.live_mib << 20).run(options.rounds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--vmkeep", required=True)
    parser.add_argument("--lab", required=True, help="tests/lab/lab.sh")
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, help="folder for repositories")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="full")
    parser.add_argument("--live-mib", type=int, default=1024)
    parser.add_argument("--tools", type=lambda text: text.split(","), help="only these, added to what was measured")
    parser.add_argument("--report", help="the Markdown file to write")
    options = parser.parse_args()
    os.makedirs(options.work, exist_ok=True)
    results = Results(os.path.join(options.work, "results.json"))
    # a short path: unix sockets live below it
    lab = Lab(options.lab, tempfile.mkdtemp(prefix="vmkb-", dir="/tmp"))
    os.chmod(lab.folder, 0o711)
    try:
        lab.start()
        for part in options.parts or PARTS:
            {"history": history, "live": live}[part](options, results, lab, options.work)
    finally:
        lab.stop()
        shutil.rmtree(lab.folder, ignore_errors=True)
    results.save()
    if options.report:
        with open(options.report, "w") as out:
            out.write(report.write(results))


if __name__ == "__main__":
    sys.exit(main())
