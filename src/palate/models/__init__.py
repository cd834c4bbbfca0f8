"""Models: one family, one file; what they share, in the files beside them."""

import logging

# bitsandbytes, where it is installed, says with every import that it has no kernel for processors; it works without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class _Empty(logging.Filter):
    """diffusers warns that modules of a network which is cast should stay float32, also when there are none."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in str(record.msg)


logging.getLogger("diffusers.models.modeling_utils").addFilter(_Empty())
