"""Recipes named -released hold what the authors' programs and configurations hold, constant by constant."""

from __future__ import annotations

import pytest

from palate import recipe

GRPO = {
    "model.lora_rank": 32, "model.lora_alpha": 64, "algorithm.group": 24, "algorithm.steps": 10,
    "algorithm.noise": "flow_sde", "algorithm.eta": 0.7, "algorithm.shift": 3.0, "algorithm.baseline": "batch",
    "algorithm.minibatches": 2, "algorithm.advantage_clip": 5.0, "algorithm.clip": 1e-4,
    "algorithm.kl_unit": "released", "algorithm.same_noise": False, "trainer.lr": 3e-4, "trainer.weight_decay": 1e-4,
    "trainer.clip_norm": 1.0, "trainer.ema_decay": 0.9, "trainer.ema_every": 4,
}  # fmt: skip
FLUX_GRPO = {
    "model.weights": "full", "model.distilled_guidance": 3.5, "algorithm.group": 12, "algorithm.shift": 3.0,
    "algorithm.unbiased": True, "algorithm.advantage_clip": 5.0, "algorithm.clip": 1e-4, "algorithm.beta": 0.0,
    "trainer.lr": 1e-5, "trainer.weight_decay": 1e-4, "trainer.clip_norm": 1.0, "trainer.steps": 300,
}  # fmt: skip
SRPO = {
    "algorithm.rollout_steps": 25, "algorithm.shift": 3.0, "algorithm.rollout_guidance": 1.0,
    "algorithm.noise": "rollout", "algorithm.levels": "released", "algorithm.timestep_length": 1000,
    "algorithm.groundtruth_ratio": 0.9, "algorithm.vis_sampling_step": 50, "algorithm.hinge": 0.7,
    "trainer.lr": 5e-6, "trainer.weight_decay": 1e-4, "trainer.clip_norm": 0.1, "trainer.steps": 19,
    "trainer.batch_size": 32,
}  # fmt: skip
HPS = {
    "algorithm.train_timestep": (5, 25), "algorithm.k_denoise": (0.1, 0.25), "algorithm.k_inversion": (0.3, 0.01)
}  # fmt: skip
NFT = {
    "model.lora_rank": 32, "model.lora_alpha": 64, "model.lora_init": "gaussian", "algorithm.group": 24,
    "algorithm.steps": 10, "algorithm.guidance": 1.0, "algorithm.n": 9, "algorithm.z": 5.0,
    "algorithm.baseline": "batch", "algorithm.adaptive": True, "trainer.lr": 3e-4, "trainer.weight_decay": 1e-4,
    "trainer.clip_norm": 1.0, "trainer.ema_every": 1, "trainer.batch_size": 48,
}  # fmt: skip
VALUES = {
    "grpo-emoji-released": {**GRPO, "algorithm.beta": 0.04},
    "grpo-sd35-released": {
        **GRPO, "algorithm.beta": 0.01, "algorithm.guidance": 4.5, "model.lora_init": "gaussian",
        "trainer.batch_size": 48,
    },
    "dance-grpo-flux-released": {
        **FLUX_GRPO, "algorithm.steps": 16, "algorithm.noise": "constant_sde", "algorithm.eta": 0.3,
        "algorithm.same_noise": "all", "algorithm.fraction": 0.6, "algorithm.fraction_rounding": "down",
        "algorithm.steps_per": "sample",
    },
    "mix-grpo-flux-released": {
        **FLUX_GRPO, "algorithm.steps": 25, "algorithm.noise": "flow_sde", "algorithm.eta": 0.7,
        "algorithm.same_noise": True, "algorithm.window": 4, "algorithm.window_every": 25, "algorithm.minibatches": 4,
    },
    "nft-sd35-released": {
        **NFT, "algorithm.beta": 1.0, "algorithm.kl": 1e-4 * 1.0 / 5, "algorithm.old_rate": 0.001,
        "algorithm.old_most": 0.5, "algorithm.old_from": 0, "algorithm.minibatches": 1, "trainer.ema_decay": 0.9,
    },
    "nft-sd35-ocr-released": {
        **NFT, "algorithm.beta": 0.1, "algorithm.kl": pytest.approx(1e-4 * 0.1 / 5), "algorithm.old_rate": 0.0075,
        "algorithm.old_most": 0.999, "algorithm.old_from": 75, "algorithm.minibatches": 2,
        "trainer.ema_decay": pytest.approx(0.9**2),
    },
    "awm-sd35-released": {
        "model.lora_rank": 32, "model.lora_alpha": 64, "model.lora_init": "gaussian", "algorithm.objective": "awm",
        "algorithm.group": 24, "algorithm.steps": 14, "algorithm.guidance": 1.0, "algorithm.n": 6,
        "algorithm.beta": 2.0 / 5, "algorithm.power": 0.25, "algorithm.baseline": "batch",
        "algorithm.advantage_clip": 5.0, "algorithm.clip": None, "algorithm.kl": 1e-4, "algorithm.kl_old": 1.0,
        "algorithm.old_rate": 0.001, "algorithm.old_most": 0.3, "algorithm.shared_noise": False,
        "algorithm.shared_time": False, "trainer.lr": 3e-4, "trainer.ema_decay": 0.99, "trainer.batch_size": 24,
    },
    "ddpo-sd15-released": {
        "model.lora_init": "gaussian", "algorithm.steps": 50, "algorithm.eta": 1.0, "algorithm.guidance": 5.0,
        "algorithm.minibatches": 2, "algorithm.clip": 1e-4, "algorithm.advantage_clip": 5.0, "algorithm.history": 32,
        "algorithm.enough": 16, "trainer.lr": 3e-4, "trainer.batch_size": 256,
    },
    "dpo-sd15-released": {
        "model.weights": "full", "algorithm.beta": 5000.0, "algorithm.caption_dropout": 0.2, "algorithm.flip": True,
        "algorithm.posterior": True, "algorithm.mu": 0.9, "trainer.batch_size": 2048, "trainer.lr": 2048e-8,
        "trainer.warmup": 500, "trainer.steps": 2000,
    },
    "sqdf-sd15-released": {
        "model.lora_init": "gaussian", "algorithm.grid": "released", "algorithm.rollout_steps": 50,
        "algorithm.eta": 1.0, "algorithm.guidance": 5.0, "algorithm.alpha_kl": 2.44e-4, "algorithm.gamma": 0.9,
        "prompts.file": "animals",
    },
    "srpo-flux-released": {**SRPO, **HPS, "model.rollout_distilled_guidance": 1.0, "model.distilled_guidance": 3.5},
    "srpo-emoji-released": {**SRPO, **HPS, "algorithm.guidance": 3.5},
    "srpo-flux-pickscore-released": {
        **SRPO, "algorithm.train_timestep": (5, 30), "algorithm.k_denoise": (0.1, 0.5),
        "algorithm.k_inversion": (0.6, 0.01), "reward.scale": {"pickscore": (0.0, 20.0)},
    },
    # not released: what its authors published of the model
    "distar-sdxl": {
        "algorithm.reward_scale": 100.0, "algorithm.alpha_cfg": 7.5, "algorithm.cfg": "in",
        "algorithm.generator.t_init": 0.400, "algorithm.generator.input_scale": 1.0,
    },
    "distar-sd15": {"algorithm.generator.t_init": 0.626, "algorithm.generator.input_scale": None},
    "distar-pixart": {"algorithm.generator.t_init": 0.441},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_recipe_holds_the_published_values(name):
    made = recipe.read(name)
    found = {}
    for key in VALUES[name]:
        value = made
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    assert found == VALUES[name]


def test_no_released_recipe_is_left_out():
    assert {name for name in recipe.published() if name.endswith("-released")} <= VALUES.keys()
