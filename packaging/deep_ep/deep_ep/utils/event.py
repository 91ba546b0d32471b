from epcomm.compat.deep_ep.utils.event import *  # noqa: F403
