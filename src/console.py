"""How programs speak to people: quiet libraries, and numbers as people write them."""

import logging
import os
import time
import warnings


def quiet_libraries(*told: str) -> None:
    """Only errors from the libraries: what matters in their warnings is reported by this project in its own words.

    Of the loggers named in ``told``, notices are shown, too.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive hivemind's forks
    warnings.filterwarnings("ignore")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in told:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("transformers", "accelerate", "bitsandbytes", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, variable in (("datasets", "DATASETS_VERBOSITY"), ("huggingface_hub", "HF_HUB_VERBOSITY")):
        logging.getLogger(name).propagate = False  # it prints by itself; the root logger would print the line again
        if variable not in os.environ:  # the library's own switch, for whoever wants to see it try again
            os.environ[variable] = "error"  # read when it is imported, which may be still to come
            logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging  # takes seconds, and --help needs it not

    transformers_logging.disable_progress_bar()
    # hivemind's own switch, for whoever wants its tracebacks; it is read when hivemind is imported, here or by a child
    if os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL") == "CRITICAL":
        os.environ.setdefault("GOLOG_LOG_LEVEL", "INFO")  # p2pd would get the same, and not say why it does not start
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def format_seconds(seconds: float) -> str:
    """A duration as people write it: 45 s, 12 min, 3.5 h, 2.1 d."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}" if divisor < 3600 else f"{seconds / divisor:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"


def format_moment(seconds: float) -> str:
    """A moment, in seconds since 1970, by this machine's clock: 2027-01-03 14:10."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):  # a pace that is next to nothing
        return "in more than a thousand years"


def counted(number: int, what: str) -> str:
    """``1 peer``, ``2 peers``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def rate(per_second: float) -> str:
    """Figures a second; a slow machine's, too, has digits that say something."""
    return f"{per_second:.1f}/s" if per_second >= 1 or per_second == 0 else f"{per_second:.2g}/s"


def format_bytes(number: float) -> str:
    """A size as people write it: 640 kB, 12 MB, 1.3 GB."""
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= 0.9995 * divisor:
            return f"{number / divisor:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
