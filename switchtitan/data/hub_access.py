"""Whether the Hugging Face hub can be reached, found out in seconds."""

import os
import ssl
import urllib.error
import urllib.request

PROBE_TIMEOUT_S = 10.0


def why_hub_is_unreachable() -> str | None:
    """Asks the hub for a sign of life: None if there is one, else the reason in a few words.

    The hub's own clients retry an unreachable host for 25 seconds and more per file, with a line each time;
    this asks once. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and the usual proxy variables count as they do for those
    clients.
    """
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{switch} is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None  # It answered; whether it gives the file is for the client to find out.
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return None  # The clients may know other certificates.
        return f"{endpoint}: {error.reason}"
    except (OSError, ValueError) as error:
        return f"{endpoint}: {error}"
