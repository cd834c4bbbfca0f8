"""optimize.py: surrogates in closed form; a budget that holds and questions that never repeat, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from palate import cli, recipe
from palate.algorithms.sqdf import SQDF, SQDFSettings
from palate.cli import exit_code_of
from palate.optimize import (
    OracleError,
    Queries,
    Search,
    Surrogate,
    call_with_timeout,
    command_oracle,
    fit_surrogate,
    from_recipe,
    http_oracle,
    identity_of,
    leave_one_out,
    load_oracle,
    optimize,
    reward_features,
    ridge_head,
    round_sizes,
    start,
    ucb_bonus,
    validate_scores,
    with_one,
)
from palate.recipe import GuardSettings, OptimizeSettings, OracleSettings, RecipeError, TrainerSettings
from palate.runtime.checkpoint import CheckpointError
from palate.runtime.errors import RewardServiceError
from palate.testing import PROMPTS, TinyFlow

D = torch.float64


def features(images, prompts):
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def warmth(images, prompts):
    return [float(v) for v in images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))]


class Oracle:
    """Counts what it is asked; `break_at` {call number: what to do} injects faults."""

    def __init__(self, break_at=None):
        self.calls, self.seen, self.break_at = 0, [], break_at or {}

    def __call__(self, images, prompts):
        self.calls += 1
        self.seen += [image.numpy().tobytes() for image in images]
        fault = self.break_at.get(self.calls)
        if isinstance(fault, BaseException):
            raise fault
        scores = warmth(images, prompts)
        return fault(scores) if fault else scores


class Stopping(SQDF):
    """Ends the process, so to say, at one update."""

    def __init__(self, settings, at=None):
        super().__init__(settings)
        self.left = at

    def step(self, *args):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("power cut")
        yield from super().step(*args)


SQDF_SETTINGS = SQDFSettings(
    rollout_steps=3,
    final_time=0.05,
    guidance=1.0,
    alpha_kl=1e-3,
    estimator="tweedie",
    buffer="uniform",
    buffer_size=4,
    rollout_every=2,
)


def go(folder, oracle, *, budget=14, rounds=2, at=(), retries=1, timeout=20.0, batch=4, surrogate="bootstrap"):
    model, made = TinyFlow(), []

    def make():
        made.append(Stopping(SQDF_SETTINGS, at[len(made)] if len(made) < len(at) else None))
        return made[-1]

    settings = OptimizeSettings(
        oracle=OracleSettings(name="jpeg-size", retries=retries, timeout=timeout, batch=batch),
        budget=budget,
        rounds=rounds,
        surrogate=surrogate,
    )
    trainer = TrainerSettings(steps=3, batch_size=2, lr=1e-2, seed=3, checkpoint_every=1, guard=GuardSettings(every=0))
    search = Search(model, make, oracle, features, PROMPTS, folder, settings, trainer)
    optimize(search, progress=False, say=lambda text: None)
    return model


def rows(folder):
    return [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Surrogates


def test_rounds():
    assert round_sizes(15360, 4) == [1024, 2048, 4096, 8192]
    for budget, rounds in ((2000, 4), (14, 3), (100, 1), (31, 4)):
        sizes = round_sizes(budget, rounds)
        assert sum(sizes) == budget and len(sizes) == rounds and min(sizes) > 1 and sizes == sorted(sizes)
    with pytest.raises(ValueError, match=r"optimize.budget = 13 is too small for 3 rounds; expected at least 14"):
        round_sizes(13, 3)


def test_leave_one_out_is_what_it_says():
    generator = torch.Generator().manual_seed(0)
    phi, y = with_one(torch.randn(9, 4, dtype=D, generator=generator)), torch.randn(9, dtype=D, generator=generator)
    brute = []
    for i in range(9):
        rest = [k for k in range(9) if k != i]
        brute.append(y[i] - phi[i] @ ridge_head(phi[rest], y[rest], 0.7))
    torch.testing.assert_close(leave_one_out(phi, y, 0.7), torch.stack(brute), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["bootstrap", "ucb"])
def test_a_surrogate_fits_an_affine_oracle_and_its_gradient(kind):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(80, 3, 4, 4, generator=generator)
    slope = torch.tensor([1.0, -2.0, 0.5, 0.3, 0.0, -0.7], dtype=D)
    targets = features(images, None).double() @ slope + 0.4
    surrogate, fit = fit_surrogate(features, images, [""] * 80, targets, OptimizeSettings(surrogate=kind), seed=0)
    assert fit["explained"] > 1 - 1e-6 and fit["ridge"] == 1e-3
    fresh = torch.rand(5, 3, 4, 4, generator=generator).requires_grad_()
    got = surrogate(fresh, [""] * 5)
    torch.testing.assert_close(got.double(), features(fresh, None).double() @ slope + 0.4, atol=2e-3, rtol=0)
    (one,) = torch.autograd.grad(got.sum(), fresh)
    (two,) = torch.autograd.grad((features(fresh, None).double() @ slope).sum(), fresh)
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)


def test_pure_noise_is_explained_by_nothing():
    generator = torch.Generator().manual_seed(2)
    images, noise = torch.rand(60, 3, 4, 4, generator=generator), torch.randn(60, dtype=D, generator=generator)
    _, fit = fit_surrogate(features, images, [""] * 60, noise, OptimizeSettings(), seed=0)
    assert abs(fit["explained"]) < 0.15 and fit["ridge"] >= 10


def test_the_surrogate_knows_where_a_drawing_is_and_where_its_prompt_wants_it():
    """Squares on a plain ground, alike but for their place: what the position oracle says of them can be predicted, and
    each side's prompt is best served by the square on that side."""
    prompts = [f"a star at the {('left', 'right', 'top', 'bottom')[k % 4]} on a gray background" for k in range(240)]
    random, images = torch.Generator().manual_seed(0), torch.full((240, 3, 64, 64), 0.5)
    for image, (x, y) in zip(images, torch.randint(0, 44, (240, 2), generator=random), strict=True):
        image[:, y : y + 20, x : x + 20] = 1.0
    reward = recipe.load_reward("emoji")
    targets = torch.tensor(load_oracle(OracleSettings(name="colour-position"))(images, prompts), dtype=D)
    surrogate, fit = fit_surrogate(
        reward_features(reward, prompts), images, prompts, standardised(targets), OptimizeSettings(heads=1), seed=0
    )
    assert fit["explained"] > 0.9
    _, blind = fit_surrogate(
        reward_features(reward, prompts[:1]), images, prompts, standardised(targets), OptimizeSettings(heads=1), seed=0
    )
    assert blind["explained"] < 0.3

    fresh = torch.full((4, 3, 64, 64), 0.5)
    for image, (x, y) in zip(fresh, ((4, 22), (40, 22), (22, 4), (22, 40)), strict=True):
        image[:, y : y + 20, x : x + 20] = 1.0
    for k in range(4):
        assert surrogate(fresh, [prompts[k]] * 4).argmax() == k


def standardised(scores):
    return (scores - scores.mean()) / scores.std()


def test_ucb():
    """The released form on features 1, 3, 5: Cov = 4; ours, with the sum of squares, shrinks as data come in."""
    data = torch.tensor([[1.0], [3.0], [5.0]], dtype=D)
    two = torch.tensor([[2.0]], dtype=D)
    covariance = torch.cov(data.T).view(1, 1)
    assert float(covariance) == 4
    assert float(ucb_bonus(two, covariance, 0.01, 1e-3)) == pytest.approx(0.00999875, abs=5e-9)
    assert float(ucb_bonus(two, data.T @ data, 1.0, 1.0)) == pytest.approx(math.sqrt(4 / 36))
    many = data.repeat(100, 1)
    assert float(ucb_bonus(two, many.T @ many, 1.0, 1.0)) == pytest.approx(math.sqrt(4 / 3501))
    assert float(ucb_bonus(1e6 * two, covariance, 1.0, 1e-3)) == 10


def test_the_bootstrap_is_the_largest_head():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(20, 3, 4, 4, dtype=D, generator=generator).requires_grad_()
    seen = features(images, None)
    mean, std = seen.mean(0).detach(), seen.std(0).detach()
    heads = torch.randn(4, 7, dtype=D, generator=generator)
    phi = with_one((seen - mean) / std)
    values, surrogate = phi @ heads.T, Surrogate(features, mean, std, heads, None)
    got = surrogate(images, [""] * 20)
    assert torch.equal(got, values.max(1).values) and len(set(values.argmax(1).tolist())) > 1
    (gradient,) = torch.autograd.grad(got.sum(), images)
    chosen = (phi * heads[values.argmax(1)]).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(chosen, images)[0])
    found = []
    for _ in range(1000):  # four heads that disagree by s: the largest is 1.02938 s above their mean
        constant = torch.zeros(4, 7, dtype=D)
        constant[:, -1] = 2 + 0.5 * torch.randn(4, dtype=D, generator=generator)
        found.append(Surrogate(features, mean, std, constant, None)(images[:1].detach(), [""])[0])
    assert float(torch.stack(found).mean()) == pytest.approx(2 + 1.02938 * 0.5, abs=4 * 0.5 * 0.7 / math.sqrt(1000))


# The budget, and resuming


def test_a_run_spends_its_budget_and_learns(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("palate"), "propagate", True)
    oracle = Oracle()
    go(tmp_path, oracle)
    assert not [record for record in caplog.records if "trained before" in record.getMessage()]  # rounds go on
    assert len(oracle.seen) == 14 == Queries(tmp_path).spent
    assert [row["round"] for row in rows(tmp_path) if "prompt" in row] == [1] * 4 + [2] * 10
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(row["round"], row["spent"], row["answered"]) for row in rounds] == [(1, 4, 4), (2, 14, 14)]
    assert (tmp_path / "round-02" / "metrics.jsonl").is_file() and (tmp_path / "adapter").exists()


def test_rewards_stay_in_deviations_of_the_base_models_own_answers(tmp_path, monkeypatch):
    """alpha_kl is per one of them, in every round. The oracle is affine in the features, so the surrogate is exact."""
    rewards, noises, step = {}, {}, Stopping.step

    def watch(self, model, reward, batch, rng):
        rewards[id(reward)], noises[id(reward)] = reward, rng.normal("watched", (2,))
        yield from step(self, model, reward, batch, rng)

    monkeypatch.setattr(Stopping, "step", watch)
    go(tmp_path, Oracle(), budget=24, surrogate="ucb")
    images, prompts, scores, rounds = Queries(tmp_path).evaluated(2)
    own = scores[rounds == 1]
    for surrogate in rewards.values():
        surrogate.bonus = None
        found = surrogate(images[:], prompts).double()
        assert torch.allclose(found, (scores - own.mean()) / own.std(correction=0), atol=0.02)
    first, second = noises.values()  # and each round draws and trains with randomness of its own
    drawn = [[row["prompt"] for row in rows(tmp_path) if row.get("round") == k][:8] for k in (1, 2)]
    assert not torch.equal(first, second) and drawn[0] != drawn[1]


def test_the_oracle_sees_what_is_stored(tmp_path):
    oracle = Oracle()
    go(tmp_path, oracle, surrogate="ucb")
    images, words, scores, _rounds = Queries(tmp_path).evaluated(2)
    assert [image.numpy().tobytes() for image in images[:]] == oracle.seen
    assert scores.tolist() == warmth(images[:], words)


@pytest.mark.parametrize("where", [(0,), (2,), (None, 1)], ids=["first update", "third update", "second round"])
def test_after_a_crash_in_training_nothing_is_asked_twice(tmp_path, where):
    whole, oracle = go(tmp_path / "whole", Oracle()), Oracle()
    with pytest.raises(RuntimeError, match="power cut"):
        go(tmp_path / "parts", oracle, at=where)
    parts = go(tmp_path / "parts", oracle)
    assert len(oracle.seen) == 14 == len(set(oracle.seen))
    assert torch.equal(weights(whole), weights(parts))
    log = (tmp_path / "whole" / "queries.jsonl").read_bytes()
    assert (tmp_path / "parts" / "queries.jsonl").read_bytes() == log
    again = go(tmp_path / "parts", oracle)  # a finished run asks nothing and ends in the same weights
    assert oracle.calls and len(oracle.seen) == 14 and torch.equal(weights(again), weights(whole))


def test_a_question_whose_answer_was_never_seen_is_spent(tmp_path):
    oracle = Oracle({2: KeyboardInterrupt()})  # the process dies while the second batch is asked
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, oracle)
    assert Queries(tmp_path).spent == 8 and len(Queries(tmp_path).evaluated(2)[1]) == 4
    with open(tmp_path / "queries.jsonl", "a") as file:
        file.write('{"query": 8, "rou')  # and its last line was cut short
    go(tmp_path, oracle)
    assert len(oracle.seen) == 14 == len(set(oracle.seen)) == Queries(tmp_path).spent
    assert len(Queries(tmp_path).evaluated(2)[1]) == 10


def test_failures_are_retried_within_the_budget(tmp_path):
    oracle = Oracle({1: ValueError("no GPU"), 3: lambda scores: [math.nan, *scores[1:]]})
    go(tmp_path, oracle)
    assert len(oracle.seen) == 14 == Queries(tmp_path).spent  # never more, retries included
    failed = [row for row in rows(tmp_path) if "failed" in row]
    assert [row["query"] for row in failed] == [0, 1, 2, 3, 8] and failed[0]["failed"] == "ValueError: no GPU"
    assert "not a finite number" in failed[4]["failed"]
    _images, _, scores, _ = Queries(tmp_path).evaluated(2)
    assert len(scores) == 9 and bool(torch.isfinite(scores).all())
    assert oracle.seen[0:4] == oracle.seen[4:8] and oracle.seen[8] == oracle.seen[12]  # the same images again


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (OSError("gone"), "OSError: gone"),
        (SystemExit("no key"), r"it ended itself by sys.exit\('no key'\)"),
        (lambda scores: [math.inf] * len(scores), "not a finite number"),
        (lambda scores: scores[:-1], "expected 4 numbers, one per image, got 3"),
        (lambda scores: 0.5, "got float"),
        (lambda scores: ["high"] * 4, "ValueError"),
    ],
)
def test_an_oracle_that_goes_on_failing_stops_the_run_with_everything_kept(tmp_path, fault, message):
    oracle = Oracle({1: fault, 2: fault})
    with pytest.raises(OracleError, match=f"failed 2 times.*{message}.*8 of 14") as error:
        go(tmp_path, oracle)
    assert exit_code_of(error.value) == 5
    go(tmp_path, oracle)  # mended: goes on where it stopped, and the failures stay spent
    assert len(oracle.seen) == 14 and len(Queries(tmp_path).evaluated(2)[1]) == 6


def test_a_budget_that_failures_have_used_up_says_why(tmp_path):
    with pytest.raises(
        ValueError, match=r"only 0 queries were answered in 14 \(the last that failed: ValueError: no GPU"
    ):
        go(tmp_path, Oracle({call: ValueError("no GPU\nat all") for call in range(1, 20)}), retries=99)


def test_an_oracle_that_hangs(tmp_path):
    def hang(images, prompts):
        time.sleep(8)

    with pytest.raises(TimeoutError, match=r"no answer in 0.1 s"):
        call_with_timeout(0.1, hang, torch.zeros(1, 3, 2, 2), ["x"])
    with pytest.raises(OracleError, match="TimeoutError"):
        go(tmp_path, hang, timeout=0.05, retries=0)


def test_a_tampered_image_or_log_is_refused(tmp_path):
    go(tmp_path, Oracle())
    (tmp_path / "queries/000002.png").write_bytes((tmp_path / "queries/000001.png").read_bytes())
    with pytest.raises(CheckpointError, match=r"000002.png is not the image"):
        Queries(tmp_path).evaluated(1)[0][:]
    (tmp_path / "queries.jsonl").write_text('{"query": 0}\nrubbish\n{"query": 1}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        Queries(tmp_path)
    (tmp_path / "queries.jsonl").write_text('{"query": 7, "score": 1.0}\n')
    with pytest.raises(ValueError, match=r"line 1: query 7 has no round; restore the file"):
        Queries(tmp_path)


# Kinds of oracle


def program(tmp_path, body):
    file = tmp_path / "oracle.py"
    file.write_text("import json, sys, time\nquestion = json.load(sys.stdin)\n" + body)
    return [sys.executable, "-S", "-E", str(file), "$(touch pwned); | & *"]


def test_a_command_is_started_without_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = program(
        tmp_path,
        "assert sys.argv[1] == '$(touch pwned); | & *'\n"
        "sizes = [open(p, 'rb').read(8) == b'\\x89PNG\\r\\n\\x1a\\n' for p in question['images']]\n"
        "print(json.dumps({'scores': [len(p) + s for p, s in zip(question['prompts'], sizes)]}))",
    )
    assert command_oracle(command, 20)(torch.rand(2, 3, 4, 4), ["ab", "cde"]) == [3, 4]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("sys.exit('no licence')", RuntimeError, "status 1: no licence"),
        ("print('high')", ValueError, "got 'high"),
        ("time.sleep(30)", TimeoutError, "no answer in 1 s"),
        ("print([1])", ValueError, "scores"),
    ],
)
def test_a_command_that_fails(tmp_path, body, error, message):
    began = time.perf_counter()
    with pytest.raises(error, match=message):
        command_oracle(program(tmp_path, body), 20 if error is not TimeoutError else 1)(torch.rand(1, 3, 4, 4), ["x"])
    assert time.perf_counter() - began < 25


def test_an_endpoint():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(question)
            self.send_response(200 if question["prompts"] != ["bad"] else 500)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [0.25] * len(question["images"])}).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        oracle = http_oracle(f"http://127.0.0.1:{server.server_port}/score", 20)
        assert oracle(torch.rand(2, 3, 4, 4), ["a", "b"]) == [0.25, 0.25]
        assert asked[0]["prompts"] == ["a", "b"] and len(asked[0]["images"]) == 2
        with pytest.raises(RewardServiceError, match="500"):
            oracle(torch.rand(1, 3, 4, 4), ["bad"])
    finally:
        server.shutdown()
        server.server_close()


def test_a_callable_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_oracle.py").write_text("def score(images, prompts):\n    return [len(p) for p in prompts]\n")
    monkeypatch.chdir(tmp_path)
    assert load_oracle(OracleSettings(function="my_oracle:score"))(None, ["abc"]) == [3]
    (tmp_path / "half.py").write_text("def score(images prompts):\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no licence')\n")
    for wrong in ("my_oracle:nothing", "no_such_module:score", "my_oracle", "my_oracle:", "half:score", "raises:score"):
        with pytest.raises(ValueError, match=r"optimize.oracle.function"):
            load_oracle(OracleSettings(function=wrong))
    with pytest.raises(ValueError, match="no program 'no-such-program'"):
        load_oracle(OracleSettings(command=["no-such-program"]))
    assert validate_scores(torch.tensor([1.0, 2.0]), 2) == [1.0, 2.0]


def test_built_in_oracles():
    grey = torch.full((2, 3, 64, 64), 0.5)
    grey[1] = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    size = load_oracle(OracleSettings(name="jpeg-size"))(grey, ["a dog"] * 2)
    assert size[0] > size[1] and -1 < float(size[0]) < -0.3
    exact = load_oracle(OracleSettings(name="colour-position"))
    from palate.models.vocabulary import vocabulary

    blue = torch.tensor(vocabulary().colours["blue"]).view(3, 1, 1) / 255
    image = blue.expand(3, 64, 64).clone()
    image[:, 20:40, 44 : 64 - 4] = 1 - blue  # a patch on the right
    batch = image.expand(4, 3, 64, 64)
    words = ["a dog on a blue background", "a dog at the right", "a dog at the left", "a dog at the right on blue"]
    got = exact(batch, words)
    assert got[0] == pytest.approx(1) and got[1] == pytest.approx((1 + 0.625) / 2, abs=0.02)
    assert got[2] == pytest.approx(1 - got[1]) and got[3] == pytest.approx((got[0] + got[1]) / 2)
    with pytest.raises(ValueError, match="names neither"):
        exact(batch[:1], ["a dog"])
    noisy = load_oracle(OracleSettings(name="jpeg-size", noise=0.5), seed=1)
    many = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    exact = load_oracle(OracleSettings(name="jpeg-size"))
    plain, one, two = (oracle(many, ["x"] * 200) for oracle in (exact, noisy, noisy))
    assert one == two  # a function of the image: asking again tells nothing new
    noise = torch.tensor(one) - torch.as_tensor(plain)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.2) and abs(float(noise.mean())) < 0.15


# Recipes


GOOD = """
run: {folder: RUN}
algorithm: {name: sqdf, estimator: tweedie}
prompts: {list: [a dog]}
optimize: {oracle: {name: jpeg-size}, budget: 20, rounds: 2}
trainer: {guard: {every: 0}}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimize.oracle.name=null"], "exactly one.*got none"),
        (["optimize.oracle.nam=x"], "did you mean"),
        (["optimize.oracle.url=http://x"], "got optimize.oracle.name and"),
        (["optimize.oracle={url: 'file:///etc/passwd'}"], "optimize.oracle.url"),
        (["reward.name=emoji"], "reward: leave it out"),
        (
            ["optimize.oracle.name=null", "optimize.oracle.command=python 'x"],
            r"^optimize.oracle.command: no closing quotation in \"python 'x\"; write it",
        ),
        (["optimize.budget=0"], "optimize.budget"),
        (["optimize.oracle={command: [x], noise: 0.1}"], "only a built-in"),
        (["optimize.heads=0"], "optimize.heads"),
        (["prompts={images: x}"], "draws its own"),
        (["prompts.sizes=[64]"], "prompts.sizes: optimize draws one size; set model.image_size"),
        (["trainer.guard.every=5"], "its own start"),
        *(
            (
                ["algorithm.buffer=" + law, "algorithm.buffer_size=4", "trainer.batch_size=8"],
                "buffer_size = 4 is smaller",
            )
            for law in ("uniform", "prioritised", "importance")
        ),
        (["algorithm.eta=0"], "KL between two different steps is infinite"),
    ],
)
def test_a_wrong_recipe_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        recipe.parse(GOOD, overrides)


def test_other_settings_do_not_continue_a_run(tmp_path):
    plan = recipe.parse(GOOD, [f"run.folder='{tmp_path}'"])
    assert recipe.parse(recipe.dump(plan)) == plan and plan.optimize.oracle.name == "jpeg-size"
    other = recipe.parse(GOOD, [f"run.folder='{tmp_path}'", "optimize.budget=30"])
    (tmp_path / "recipe.yaml").write_text(recipe.dump(other))
    with pytest.raises(ValueError, match="begun with other settings"):
        from_recipe(plan)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(recipe.read("sqdf-emoji")))
    with pytest.raises(ValueError, match="a run of palate train; choose another"):
        from_recipe(plan)


def test_the_answers_are_not_lost_to_another_command(tmp_path):
    plan = recipe.parse(GOOD, [f"run.folder='{tmp_path}'"])
    (tmp_path / "recipe.yaml").write_text(recipe.dump(plan))
    (tmp_path / "queries.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"continue it with `palate optimize .*recipe.yaml`"):
        cli.app(["resume", str(tmp_path)], standalone_mode=False)
    with pytest.raises(ValueError, match=r"queries of a black-box objective.*choose another run.folder"):
        cli.app(["train", "sqdf-emoji", f"run.folder='{tmp_path}'"], standalone_mode=False)
    assert (tmp_path / "queries.jsonl").exists()


def test_a_mended_oracle_continues_a_run(tmp_path):
    """How it is reached, and how long one waits, change no question; what is asked and learned does."""

    def identity(*overrides):
        return identity_of(recipe.parse(GOOD, overrides))

    served = "optimize.oracle={url: 'http://a/b'}"
    assert identity() == identity(
        "optimize.oracle.timeout=5",
        "optimize.oracle.retries=9",
        "optimize.oracle.batch=2",
        "run.folder=elsewhere",
        "trainer.checkpoint_every=3",
        "sample.steps=null",
    )
    assert identity(served) == identity("optimize.oracle={url: 'http://moved:8000/b'}") != identity()
    for name in ("one", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a dog", "questions": [name]}) + "\n")
    asked, moved, others = (
        identity(f"optimize.oracle={{checklist: '{tmp_path / file} http://{host}/v1#m'}}")
        for file, host in (("one.jsonl", "a"), ("one.jsonl", "b"), ("other.jsonl", "a"))
    )
    assert asked == moved != others and asked != identity()
    assert (
        len(
            {
                identity(),
                identity("optimize.oracle.name=hidden-judge"),
                identity("optimize.oracle.noise=0.1"),
                identity("optimize.budget=30"),
                identity("trainer.steps=7"),
                identity("algorithm.gamma=0.5"),
                identity("optimize.heads=2"),
                identity("optimize.oracle={command: [x]}"),
                identity(served),
            }
        )
        == 9
    )


def test_the_published_recipe_runs_on_the_embedded_model(tmp_path):
    """As `palate optimize` runs it, small; the same command once more asks nothing."""
    plan = recipe.read(
        "optimize-emoji",
        [
            f"run.folder='{tmp_path / 'run'}'",
            "optimize.oracle={name: jpeg-size, batch: 3}",
            "optimize.budget=6",
            "optimize.rounds=2",
            "trainer.steps=1",
            "trainer.batch_size=2",
            "algorithm.rollout_steps=2",
            "sample.steps=2",
        ],
    )
    for _ in range(2):
        outcome = from_recipe(plan, say=lambda text: None)
        assert outcome.step == 6 and outcome.exit_code == 0
    images, words, scores, rounds = Queries(tmp_path / "run").evaluated(2)
    assert images[:].shape == (6, 3, 64, 64) and rounds.tolist() == [1, 1, 2, 2, 2, 2]
    torch.testing.assert_close(scores.float(), load_oracle(OracleSettings(name="jpeg-size"))(images[:], words))
    assert (tmp_path / "run/adapter/pytorch_lora_weights.safetensors").is_file()
    assert len((tmp_path / "run/rounds.jsonl").read_text().splitlines()) == 2


def test_a_search_keeps_the_paths_that_it_began_with(tmp_path, monkeypatch):
    """Absolute those of a new one, as they are written those of one from before; the same command goes on with both."""

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    made = recipe.read("optimize-emoji", ["model.training_adapter=lora", "run.folder=search"])
    for name in ("check_folder", "check_start", "load_consistency"):
        monkeypatch.setattr(start, name, lambda *args: None)
    monkeypatch.setattr(start.builder, "build_model", lambda made, **options: None)
    monkeypatch.setattr(start, "load_reward", stop)  # once recipe.yaml is written
    stored = tmp_path / "search" / "recipe.yaml"
    for kept in (recipe.begun(made), made):
        for command in (made, kept):
            with pytest.raises(Stopped):
                start.from_recipe(command)
            assert stored.read_text() == recipe.dump(kept)
        stored.write_text(recipe.dump(made))  # as versions from before have written it
    assert recipe.begun(made).model.training_adapter == str(tmp_path / "lora")


@pytest.mark.parametrize("named", ["mine.py:score", "mine:score"])
def test_answers_of_another_version_of_an_objective_are_not_mixed_unseen(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "mine.py"
    code.write_text("def score(images, prompts): return [0.0] * len(prompts)\n")
    for owner, name in ((start.builder, "build_model"), (start, "load_consistency")):
        monkeypatch.setattr(owner, name, lambda *args, **options: None)
    monkeypatch.setattr(start, "load_reward", lambda *args: pytest.fail("begun"))  # once its files are written
    made = recipe.read("optimize-emoji", [f"optimize.oracle={{function: '{named}'}}", "run.folder=search"])
    with pytest.raises(pytest.fail.Exception):
        start.from_recipe(made)
    code.write_text("def score(images, prompts): return [1.0] * len(prompts)\n")
    with pytest.raises(ValueError, match=r"optimize.oracle.function: what it names has changed since") as told:
        start.from_recipe(made)
    assert "or delete search/identity.json to go on with the answers" in str(told.value)
    (tmp_path / "search" / "identity.json").unlink()
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception):
            start.from_recipe(made)


@pytest.mark.parametrize("answer", ["12", b"12", {0: 0.5, 1: 0.25}, {0.5, 0.25}, [0.5, None], 3])
def test_an_answer_that_is_no_list_of_numbers_is_refused(answer):
    """The letters of a text, the keys of a mapping and a set in no order would all pass for scores."""
    with pytest.raises(ValueError, match="expected 2 numbers, one per image, got"):
        validate_scores(answer, 2)


@pytest.mark.parametrize(
    "changed", ["sample.guidance=3", "sample.steps=7", "optimize.oracle={{checklist: '{} https://a/v1#n'}}"]
)
def test_a_search_goes_on_with_pictures_drawn_alike_and_judged_alike(tmp_path, monkeypatch, changed):
    monkeypatch.setenv("PALATE_REWARD_TOKEN", "x")
    monkeypatch.setenv("PALATE_REWARD_HOSTS", "a")
    (questions := tmp_path / "q.jsonl").write_text('{"prompt": "a dog", "questions": ["Is there a dog?"]}\n')
    given = [f"run.folder='{tmp_path / 'run'}'", f"optimize.oracle={{checklist: '{questions} https://a/v1#m'}}"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.dump(recipe.parse(GOOD, given)))
    with pytest.raises(ValueError, match="was begun with other settings"):
        from_recipe(recipe.parse(GOOD, [*given, changed.format(questions)]))
