"""deep_ep on epcomm: https://github.com/deepseek-ai/DeepEP's interface, epcomm's transports."""

import os

from _epcomm_deep_ep import check

check(os.path.dirname(os.path.abspath(__file__)))

from epcomm.compat.deep_ep import *  # noqa: E402, F403
from epcomm.compat.deep_ep import __version__  # noqa: E402, F401

__epcomm__ = True  # tells epcomm.compat.install() that there is nothing to do
