from epcomm.compat.deep_ep.buffers.legacy import *  # noqa: F403
