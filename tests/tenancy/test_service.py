"""The ledger in the database, what tenants keep, and tenants themselves."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from loramux.registry import Registry
from loramux.tenancy import Limits, QuotaError, Tenancy, TenancyError
from loramux.tenancy.quotas import Usage
from registry.uploads import put
from tenancy.helpers import both


@pytest.fixture
def acme(tenancy):
    tenancy.tenants.create("acme", actor="test")
    made = tenancy.keys.create("acme", ["infer"], actor="test")
    return tenancy.keys.authenticate(made.secret)


@both
def test_the_ledger_is_the_sum_of_what_was_settled_in_all_processes(tenancy, second, acme):
    others = [tenancy, second(), second()]
    spent = [0, 0, 0]

    def spend(at: int) -> None:
        for i in range(30):
            reservation = others[at].quotas.reserve(acme, 100)
            if i % 5 == 0:
                reservation.cancel()
            else:
                reservation.settle(i + at)
                spent[at] += i + at
            if i % 10 == 9:
                others[at].flush()

    threads = [threading.Thread(target=spend, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for books in others:
        books.close()
    assert tenancy.ledger("acme") == Usage(3 * 24, sum(spent))


def test_the_ledger_is_kept_by_days(tenancy, acme, wall):
    tenancy.quotas.reserve(acme, 10).settle(3)
    tenancy.flush()
    wall.now += 86_400
    tenancy.quotas.reserve(acme, 10).settle(4)
    tenancy.flush()
    assert tenancy.ledger("acme", day="2027-01-15") == Usage(1, 3)
    assert tenancy.ledger("acme", day="2027-01-16") == Usage(1, 4)
    assert tenancy.ledger("acme") == Usage(2, 7)
    assert tenancy.ledger("nobody") == Usage()


def test_a_ledger_that_cannot_be_written_now_is_written_later(tenancy, acme, monkeypatch):
    import loramux.tenancy.service as service

    def full(*_: object) -> None:
        raise OSError("disk full")

    tenancy.quotas.reserve(acme, 10).settle(3)
    with monkeypatch.context() as broken:
        broken.setattr(service, "_add", full)
        with pytest.raises(OSError, match="disk full"):
            tenancy.flush()
    tenancy.quotas.reserve(acme, 10).settle(4)
    tenancy.flush()
    assert tenancy.ledger("acme") == Usage(2, 7)


def test_the_limit_of_bytes_and_adapters_looks_at_the_registry(tmp_path):
    with Registry.open(tmp_path / "registry") as registry:
        tenancy = Tenancy.open(registry.database)
        limits = Limits(max_bytes=40, max_adapters=2)
        tenancy.tenants.create("ann", limits=limits, actor="test")
        made = tenancy.keys.create("ann", ["adapters:write"], actor="test")
        ann = tenancy.keys.authenticate(made.secret)
        tenancy.quotas.check_upload(ann, 40)
        put(registry, tmp_path, "x" * 8)  # 10 bytes with its config
        put(registry, tmp_path, "y" * 8, tenant="ben")
        tenancy.quotas.check_upload(ann, 30)
        with pytest.raises(QuotaError, match="41 bytes of 40"):
            tenancy.quotas.check_upload(ann, 31)
        put(registry, tmp_path, "z" * 8)
        with pytest.raises(QuotaError, match="3 adapters of 2"):
            tenancy.quotas.check_upload(ann, 1)
        registry.delete("ann/sums@1", actor="test")
        tenancy.quotas.check_upload(ann, 30)


def test_a_tenants_name_is_taken_once(tenancy):
    tenancy.tenants.create("acme", actor="test")
    with pytest.raises(TenancyError, match="exists") as refused:
        tenancy.tenants.create("acme", actor="test")
    assert refused.value.code == "tenant_exists"


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "../x", "a" * 64, "-a", "é", "a b"])
def test_a_tenant_is_named_as_the_registry_allows(tenancy, name):
    with pytest.raises(ValueError, match="tenant name"):
        tenancy.tenants.create(name, actor="test")
    assert tenancy.tenants.list() == []


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e9, True])
def test_a_weight_is_a_number_that_divides(tenancy, weight):
    with pytest.raises(ValueError, match=r"from 0\.001 to 1000"):
        tenancy.tenants.create("acme", weight=weight, actor="test")


def test_a_tenant_that_does_not_exist_is_named_with_its_neighbours(tenancy):
    tenancy.tenants.create("acme", actor="test")
    for change in (tenancy.tenants.get, lambda name: tenancy.tenants.disable(name, actor="test")):
        with pytest.raises(TenancyError, match="did you mean 'acme'"):
            change("acne")


def test_tenancy_works_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import loramux.tenancy as t\n"
        "[getattr(t, name) for name in t.__all__]\n"
        "import loramux.cli.tenant, loramux.cli.key"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
