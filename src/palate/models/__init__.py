"""Models: one family, one file; what they share, in the files beside them."""

import logging

# bitsandbytes, where it is installed, says with every import that it has no kernel for processors; it works without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
