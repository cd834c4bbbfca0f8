"""The workflows: what they run is there, and a job is given what it needs. None of them can be run here."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from support import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return yaml.safe_load(request.param.read_text("utf-8"))


def test_every_step_uses_a_version_of_an_action_or_runs_what_is_there(workflow):
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert re.fullmatch(r"[\w-]+/[\w/-]+@[\w./-]+", step.get("uses", "a/b@v1")), step["uses"]
            for target in re.findall(r"\bmake ([a-z-]+)", step.get("run", "")):
                assert target in TARGETS, f"make {target}"


def test_jobs_wait_for_jobs_that_are_there_and_ask_for_rights_by_name(workflow):
    jobs = workflow["jobs"]
    assert workflow["permissions"] == {"contents": "read"}  # a job that needs more says so itself
    for job in jobs.values():
        assert job["runs-on"] == "ubuntu-latest" and job.get("needs", next(iter(jobs))) in jobs
    ids = {step["id"] for job in jobs.values() for step in job["steps"] if "id" in step}
    assert set(re.findall(r"steps\.(\w+)\.", str(workflow))) <= ids


def test_the_tests_run_on_every_python_that_the_classifiers_name():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))["jobs"]
    named = {entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)}
    assert set(jobs["test"]["strategy"]["matrix"]["python"]) == named


def test_a_tag_alone_publishes():
    published = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text("utf-8"))
    assert published[True] == {"push": {"tags": ["v*"]}}  # YAML reads the word `on` as true
    assert published["jobs"]["publish"]["permissions"] == {"id-token": "write"}
