from epcomm.compat.deep_ep.buffer import *  # noqa: F403
