"""What the benchmarks of the network services have in common: CPU and memory of a process and its children, rows, results.

CPU is utime+stime of all processes for a fixed amount of work, so the machine's other work shifts it little; ratios are medians
over interleaved rounds. Memory is PSS.
"""
import atexit, json, os, pathlib, platform, re, signal, statistics, subprocess, sys, time

ROOT = pathlib.Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")


def build(*args):
    """Builds static binaries with the profile of the images; the directory they are in."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    triple = f"{platform.machine()}-unknown-linux-gnu"
    env = dict(os.environ, RUSTFLAGS="-C target-feature=+crt-static")
    subprocess.run(["cargo", "build", "--locked", "--quiet", "--profile", "small", "--target", triple, *args], cwd=ROOT, env=env, check=True)
    return target / triple / "small"


def own_network(**env):
    """Goes on in a network namespace of its own, with `env` set: no firewall's connection tracking (whose table 100,000 connections fill), no
    ports or settings of others. Without root it stays where it is. Build first: there is no way out from there."""
    if os.geteuid() != 0 or os.environ.get("OWN_NETWORK") or subprocess.run(["unshare", "--net", "true"]).returncode:
        return
    inner = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, *sys.argv]
    os.execvpe("unshare", ["unshare", "--net", *inner], dict(os.environ, OWN_NETWORK="1", **env))


def tree(pid):
    """The process and everything below it."""
    pids = [pid]
    for at in pids:
        try:
            for task in os.listdir(f"/proc/{at}/task"):
                pids += [int(child) for child in open(f"/proc/{at}/task/{task}/children").read().split()]
        except OSError:
            pass
    return pids


def ticks(pid):
    total = 0
    for at in tree(pid):
        fields = open(f"/proc/{at}/stat").read().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total


def pss(pid):
    total = 0
    for at in tree(pid):
        total += int(re.search(r"^Pss:\s+(\d+)", open(f"/proc/{at}/smaps_rollup").read(), re.M).group(1)) * 1024
    return total


def wait(what, test, limit=60):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            found = test()
        except OSError:
            found = None
        if found:
            return found
        time.sleep(0.02)
    raise SystemExit(f"gave up waiting for {what}")


def settled(pid):
    """PSS once it has stopped changing."""
    last = -1
    def same():
        nonlocal last
        last, before = pss(pid), last
        time.sleep(0.2)
        return abs(last - before) < 64 << 10
    wait("memory to settle", same)
    return last


def listening(port):
    import socket
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


class Proc:
    def __init__(self, args, **more):
        self.process = subprocess.Popen([str(arg) for arg in args], **more)
        self.pid = self.process.pid
        # A benchmark that fails half-way leaves nothing running.
        atexit.register(self.end)

    def line(self):
        return self.process.stdout.readline().strip()

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                for at in tree(self.pid):
                    os.kill(at, signal.SIGKILL)
                self.process.wait()


def commit():
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def machine():
    model = re.search(r"model name\s*:\s*(.*)", open("/proc/cpuinfo").read())
    return f"{os.cpu_count()} x {model.group(1) if model else platform.machine()}, Linux {platform.release()}"


class Rows:
    def __init__(self):
        self.rows = []
        print(f"{'what':<52} {'unit':<12} {'ours':>9} {'peer':>11} {'theirs':>9} {'ratio':>7}  goal")

    def add(self, what, unit, ours, peer, theirs, ratio, goal, met):
        self.rows.append({"what": what, "unit": unit, "ours": ours, "peer": peer, "theirs": theirs, "ratio": ratio, "goal": goal, "met": bool(met)})
        shown = lambda value: "-" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 1000 else f"{value:.0f}"
        print(f"{what:<52} {unit:<12} {shown(ours):>9} {peer or '-':>11} {shown(theirs):>9} {shown(ratio):>7}  {goal:<16} {'met' if met else 'MISSED'}", flush=True)

    def compare(self, what, unit, samples, goal):
        """`samples`: for `ours` and each peer the figures of all rounds, in the same order."""
        for peer in samples:
            if peer != "ours":
                ratio = statistics.median(a / b for a, b in zip(samples["ours"], samples[peer]) if b)
                self.add(what, unit, statistics.median(samples["ours"]), peer, statistics.median(samples[peer]), ratio, f"<= {goal}x", ratio <= goal)

    def save(self, name, whole=True):
        """Writes bench/results/NAME.json. When not all was measured, other rows of the same commit and machine stay."""
        file = ROOT / "bench/results" / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        if not whole and (before.get("commit"), before.get("machine")) == (commit(), machine()):
            measured = {(row["what"], row["peer"]) for row in self.rows}
            self.rows = [row for row in before["rows"] if (row["what"], row["peer"]) not in measured] + self.rows
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": machine(), "commit": commit(), "rows": self.rows}, indent=1) + "\n")
        missed = [row["what"] for row in self.rows if not row["met"]]
        print("all goals met" if not missed else f"missed: {', '.join(missed)}")
