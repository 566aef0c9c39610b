"""The Hub on localhost that all tests see. huggingface_hub reads its address once: so this is imported before."""

import os
import tempfile

import hub_server

_, HUB, _url = hub_server.serve()
os.environ |= {"HF_ENDPOINT": _url, "HF_HOME": tempfile.mkdtemp(prefix="hf-"), "HF_HUB_DISABLE_XET": "1"}
os.environ.pop("HF_TOKEN", None)
