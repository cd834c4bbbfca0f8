from palate.testing import TinyFlow


class TheirModel(TinyFlow):
    """The tiny model; it has no folder of weights."""

    @classmethod
    def load(cls, folder, *, training, lora_rank, lora_alpha, lora_targets, names, dtype="float32"):
        return cls()
