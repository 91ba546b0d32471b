from epcomm.compat.deep_ep.utils import *  # noqa: F403
