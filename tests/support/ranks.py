"""Every algorithm in its smallest form, on networks that the loop can shard; a run of them, and its comparison."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from support.loop import rows, run, srpo, tensors
from torch import nn

from palate.algorithms.ddpo import DDPO, DDPOSettings
from palate.algorithms.dgpo import DGPO, DGPOSettings
from palate.algorithms.direct import Direct, DirectSettings
from palate.algorithms.distar import Distar, DistarSettings, Generator
from palate.algorithms.dpo import DPO, DPOSettings
from palate.algorithms.draft import DRaFT, DRaFTSettings
from palate.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from palate.algorithms.leap_align import LeapAlign, LeapAlignSettings
from palate.algorithms.nft import NFT, NFTSettings
from palate.algorithms.opd import OPD, OPDSettings, Teacher
from palate.algorithms.refl import ReFL, ReFLSettings
from palate.algorithms.sqdf import SQDF, SQDFSettings
from palate.rewards.learned import BlackBox
from palate.sampling import FewStepGenerator
from palate.testing import PROMPTS, TinyFlow
from palate.testing import tiny_reward as reward

STEPS = 4
# one prompt, so that in many steps a rank has no sample of this teacher's; and the others
TEACHERS = {"warm": Teacher("", prompts=tuple(PROMPTS[:1])), "cold": Teacher("", prompts=tuple(PROMPTS[1:]))}


MAKE = {
    "srpo": srpo,
    "refl": lambda: ReFL(ReFLSettings(T=3, T1=1, T2=2, guidance=1.0, lam=1.0)),
    "draft": lambda: DRaFT(DRaFTSettings(steps=2, guidance=1.0)),
    "ddpo": lambda: DDPO(DDPOSettings(steps=3, guidance=1.0, minibatches=2)),
    "flow_grpo": lambda: FlowGRPO(FlowGRPOSettings(group=2, steps=3, guidance=1.0)),
    "nft": lambda: NFT(NFTSettings(group=2, steps=2, n=2)),
    "nft-released": lambda: NFT(
        NFTSettings(group=2, steps=2, n=2, beta=0.1, baseline="batch", minibatches=2, old_from=3, old_rate=0.1)
    ),
    "dpo": lambda: DPO(DPOSettings(steps=2, guidance=1.0, beta=10.0)),
    "dpo-online": lambda: DPO(
        DPOSettings(
            steps=2, guidance=1.0, beta=10.0, pairs_from="policy", refresh_every=2, safeguard="output", noise="tracked"
        )
    ),
    "leap_align": lambda: LeapAlign(LeapAlignSettings(steps=3, guidance=1.0)),
    "flow_grpo-released": lambda: FlowGRPO(
        FlowGRPOSettings(
            group=2,
            steps=3,
            guidance=1.0,
            noise="flow_sde",
            eta=0.7,
            baseline="batch",
            minibatches=2,
            kl_unit="released",
        )
    ),
    "dgpo": lambda: DGPO(DGPOSettings(group=2, steps=2, guidance=1.0, n=2, beta=10.0)),
    "awm": lambda: DGPO(
        DGPOSettings(group=2, steps=2, guidance=1.0, objective="awm", power=0.25, kl_old=1.0, clip=None, old_rate=0.2)
    ),
    "opd": lambda: OPD(OPDSettings(teachers=TEACHERS, steps=3, eta=0.5, guidance=1.0)),
    "sqdf": lambda: SQDF(
        SQDFSettings(rollout_steps=3, final_time=0.02, guidance=1.0, estimator="tweedie", buffer_size=16)
    ),
    "sqdf-fresh": lambda: SQDF(
        SQDFSettings(rollout_steps=6, final_time=0.02, guidance=1.0, estimator="tweedie", buffer="none")
    ),
    "distar": lambda: Distar(DistarSettings(generator=Generator(t_init=0.7))),
    "distar-head": lambda: Distar(
        DistarSettings(generator=Generator(t_init=0.7), head_queries=2, head_first=2, head_memory=6)
    ),
    "direct": lambda: Direct(
        DirectSettings(generator=FewStepGenerator(t_init=0.7, steps=1), positive=("warm",), negative=("cold", "dull"))
    ),
}


class Block(nn.Sequential):
    """What FSDP2 cuts by itself; the layer after it belongs to the root."""


class Networks(TinyFlow):
    """The stand-in with an assistant network, and with what the loop needs to shard it, or as adapters of one network.

    `training`: "full" or "lora".
    """

    def __init__(self, dtype=torch.float32, others=(), training="full"):
        super().__init__()
        names = ("policy", *others)
        self.net.to(dtype), self.reference.to(dtype)
        if training == "lora":
            from diffusers.loaders import PeftAdapterMixin

            from palate.models.weights import NamedWeights

            adapted = type("Adapted", (nn.Sequential, PeftAdapterMixin), {})
            with torch.random.fork_rng():
                torch.manual_seed(4)
                self.weights = NamedWeights(
                    adapted(*self.net), training="lora", rank=2, alpha=None, targets=["0", "2"], names=names
                )
            for k, name in enumerate(TEACHERS):
                if name in names:
                    _move(self.weights.parameters(name), k)
        else:
            self.net = nn.Sequential(Block(*self.net[:2]), self.net[2])
            self.net._no_split_modules = ["Block"]
            copies = {name: copy.deepcopy(self.net) for name in names[1:]}
            for k, name in enumerate(TEACHERS):
                if name in copies:
                    _move(copies[name].requires_grad_(False).parameters(), k)
            networks = {"policy": self.net, "reference": self.reference, **copies}
            self.weights = SimpleNamespace(
                training="full",
                networks=networks,
                using=lambda name: contextlib.nullcontext(networks[name]),
                parameters=lambda name: list(networks[name].parameters()),
            )

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        with self.weights.using(weights) as self.net:
            return super().predict(xt, t, cond, guidance=guidance)

    def parameters(self, weights="policy"):
        return self.weights.parameters(weights)

    def save_adapter(self, folder):
        if not any(hasattr(p, "full_tensor") for p in self.parameters()):
            super().save_adapter(folder)


def _move(parameters, seed):
    """A teacher that says something else than the student does."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=noise).to(p))


def go(folder, name="srpo", *, dtype=torch.float32, training="full", **options):
    options = {"steps": STEPS, "batch_size": 8, "clip_norm": 1e-5, "checkpoint_every": 0, "threads": 1,
               "ema_decay": 0.5,
               "algorithm": MAKE[name]()} | options  # fmt: skip
    asked = BlackBox(reward, lambda images, prompts: torch.cat([images.mean((2, 3)), images.std((2, 3))], 1))
    rate = options.pop("reward", asked if name == "distar-head" else reward)
    if "TRACE" in os.environ:
        print(round(time.time() - float(os.environ["TRACE"]), 2), round(time.process_time(), 2), folder, flush=True)
    others = {"distar": ("assistant",), "distar-head": ("assistant",), "opd": tuple(TEACHERS)}.get(name, ())
    model = Networks(dtype, others, training)
    return run(Path(folder), model=model, reward=rate, **options)


def identical(a: Path, b: Path, step: int = STEPS) -> None:
    first, second = tensors(a, step), tensors(b, step)
    assert set(first) == set(second)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert rows(a) == rows(b)
