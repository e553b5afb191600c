"""Ports: free or taken, and by whom."""

import os
import socket

from ops.ports import LOOPBACK, free_ports, holder, is_free, is_listening


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(is_free(port) for port in ports)


def test_a_taken_port_is_not_free_and_its_holder_is_named() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
        assert is_listening(port)
        assert f"(pid {os.getpid()})" in holder(port)
    assert is_free(port)
    assert not is_listening(port)
    assert holder(port) == "another process"


def test_a_port_with_closed_connections_is_free_again() -> None:
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection((LOOPBACK, port))
        connection, _ = server.accept()
        connection.close()  # the server's side closes first and stays in TIME_WAIT
        client.close()
    assert is_free(port)
