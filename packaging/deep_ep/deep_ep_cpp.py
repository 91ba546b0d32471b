"""deep_ep's extension module, on epcomm."""

import deep_ep  # noqa: F401 - refuses beside another deep_ep

from epcomm.compat.deep_ep_cpp import *  # noqa: F403

__epcomm__ = True
