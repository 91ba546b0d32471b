from epcomm.compat.deep_ep.utils.envs import *  # noqa: F403
