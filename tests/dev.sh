# shellcheck shell=bash
# The part of ./dev that tests, measures and generates. Sourced by it.
# shellcheck disable=SC2154,SC2034

# ---------------------------------------------------------------------------------------------------- stages

PASSED=0 FAILED=0 STAGES=()

# stage TITLE COMMAND...: runs a suite in a subshell of its own and keeps its counts; a failure does not hide the next suite's
# result. A suite that prints no counts of its own is one test.
stage() {
  local title=$1 start rc=0 passed failed line log
  shift
  start=$(now_ms)
  log=$WORK/stage.log
  rm -f "$WORK/counts"
  printf '\n%s▸ %s%s\n' "$B" "$title" "$N"
  # Not in an `if` or `||`: there `set -e` would not hold inside.
  set +e
  ( set -e; "$@" ) </dev/null > >(tee "$log") 2>&1
  rc=$?
  set -e
  if [[ -s $WORK/counts ]]; then read -r passed failed <"$WORK/counts"; else passed=0 failed=0; (( rc )) || passed=1; fi
  # A suite that failed says so, whatever it counted; one that counted nothing did not run.
  if (( rc && ! failed )); then failed=1; fi
  if (( passed + failed == 0 )); then failed=1; fi
  PASSED=$(( PASSED + passed )); FAILED=$(( FAILED + failed ))
  if (( failed )); then line="$R✗$N"; else line="$G✓$N"; fi
  line=$(printf '%s %-44s %5d passed %3d failed  %s' "$line" "$title" "$passed" "$failed" "$(seconds $(( $(now_ms) - start )))")
  STAGES+=("$line")
  printf '%s\n' "$line"
}

# counts PASSED FAILED: what the running stage has to report.
counts() { echo "$1 $2" >"$WORK/counts"; }

# counted COMMAND...: a suite whose output ends with "N passed, N failed".
counted() {
  local rc=0 last
  "$@" 2>&1 | tee "$WORK/counted.log" || rc=${PIPESTATUS[0]}
  last=$(sed 's/\x1b\[[0-9;]*m//g' "$WORK/counted.log" | grep -E '^[0-9]+ passed, [0-9]+ failed' | tail -n 1)
  if [[ $last =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed ]]; then counts "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"; fi
  return "$rc"
}

suite_rust() {
  local rc=0 summary run=0 passed=0
  # A test runs it as a program.
  cargo build --locked --quiet -p clawhq-wire --example ws_echo
  cargo nextest run --locked --workspace --no-fail-fast "$@" 2>&1 | tee "$WORK/nextest.log" || rc=${PIPESTATUS[0]}
  summary=$(sed 's/\x1b\[[0-9;]*m//g' "$WORK/nextest.log" | grep -E '^ *Summary ' | tail -n 1)
  [[ $summary =~ ([0-9]+)(/[0-9]+)?\ tests?\ run ]] && run=${BASH_REMATCH[1]}
  [[ $summary =~ ([0-9]+)\ passed ]] && passed=${BASH_REMATCH[1]}
  counts "$passed" $(( run - passed ))
  return "$rc"
}

suite_doc() {
  local rc=0
  cargo test --locked --workspace --doc --no-fail-fast 2>&1 | tee "$WORK/doc.log" || rc=${PIPESTATUS[0]}
  counts "$(awk '/^test result:/ {n += $4} END {print n + 0}' "$WORK/doc.log")" "$(awk '/^test result:/ {n += $6} END {print n + 0}' "$WORK/doc.log")"
  return "$rc"
}

suite_scripts() {
  local script
  local -a scripts=()
  mapfile -t scripts < <(git ls-files -z 2>/dev/null | xargs -0 grep -lE '^#!.*\b(ba)?sh\b|^# shellcheck shell=' 2>/dev/null | grep -v node_modules)
  (( ${#scripts[@]} )) || scripts=(dev tests/dev.sh .ci/run)
  for script in "${scripts[@]}"; do bash -n "$script"; done
  if command -v shellcheck >/dev/null; then shellcheck -x -S warning "${scripts[@]}"; fi
  counts "${#scripts[@]}" 0
}

suite_openapi() { cmd_openapi --check; counts 1 0; }

# The console in a real browser, against a real ClawHQ of its own.
suite_e2e() {
  local rc=0 data=$WORK/e2e
  e2e_environment "$data"
  "$ROOT/dev" up
  CHROMIUM=$(command -v chromium || command -v chromium-browser || command -v google-chrome) \
    BASE_URL=http://localhost:$(port_of CLAWHQ_API__LISTEN 4180) counted npm --prefix web run e2e || rc=$?
  if (( rc )); then as_root tail -n 60 "$data/log/clawhq.log" | cut -c 1-400; fi
  "$ROOT/dev" down --purge || rc=1
  # A container that outlives its daemon would be nobody's.
  if pgrep -f "$data/docker" >/dev/null; then say "Left over: $(pgrep -af "$data/docker" | cut -c 1-160)"; rc=1; fi
  return "$rc"
}

# A whole ClawHQ beside any other on this machine: own data, own ports, own daemon.
e2e_environment() {
  export CLAWHQ_DATA=$1 CLAWHQ_SKIP_OPENCLAW=1
  unset DATABASE_URL DOCKER_HOST
  local -a ports
  mapfile -t ports < <(free_ports 3)
  export CLAWHQ_API__LISTEN=127.0.0.1:${ports[0]} CLAWHQ_EDGE__LISTEN=127.0.0.1:${ports[1]} CLAWHQ_API__NODE_LISTEN=127.0.0.1:${ports[2]}
  # A daemon of its own even where one answers: the tests kill and restart it.
  as_root mkdir -p "$1/docker"
}

free_ports() {
  node -e '
    const net = require("node:net"); const open = []
    const next = () => open.length < Number(process.argv[1])
      ? open.push(net.createServer().listen(0, "127.0.0.1", next))
      : (console.log(open.map((s) => s.address().port).join("\n")), open.forEach((s) => s.close()))
    next()' "$1"
}

# ---------------------------------------------------------------------------------------------------- test

need_nextest() {
  export PATH="$CACHE/tools/bin:$PATH"
  cargo nextest --version >/dev/null 2>&1 && return
  # The distribution has none; cargo builds it once, outside the checkout.
  CARGO_TARGET_DIR=$CACHE/tools/target step "cargo-nextest installed" nextest \
    cargo install --locked --root "$CACHE/tools" "cargo-nextest@$NEXTEST_VERSION"
  rm -rf "$CACHE/tools/target"
}

# The WebSocket cases come from PyPI, into an environment of their own outside the checkout.
need_kosoku() {
  [[ -x ${KOSOKU:-} ]] && return
  export KOSOKU=$CACHE/tools/kosoku-$KOSOKU_VERSION/bin/kosoku
  [[ -x $KOSOKU ]] && return
  step "kosoku installed" kosoku install_kosoku
}
install_kosoku() {
  local env=${KOSOKU%/bin/kosoku}
  rm -rf "$env"
  python3 -m venv "$env"
  "$env/bin/pip" install --quiet --disable-pip-version-check "kosoku==$KOSOKU_VERSION"
}

need_components() {
  cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 && return
  command -v rustup >/dev/null || die "rustfmt and clippy are missing: install them with your Rust toolchain."
  step "rustfmt and clippy installed" components rustup component add rustfmt clippy
}

test_ended() {
  local rc=$?
  trap - EXIT INT TERM
  set +e
  # Whatever a suite left behind goes, by record.
  local dir
  for dir in "$WORK" "$WORK/e2e"; do
    [[ -d $dir/run ]] || continue
    DATA=$dir
    stop clawhq TERM 20; stop postgres INT 20
    if [[ -S $dir/docker/docker.sock ]]; then
      as_root env DOCKER_HOST="unix://$dir/docker/docker.sock" docker ps -aq 2>/dev/null |
        as_root env DOCKER_HOST="unix://$dir/docker/docker.sock" xargs -r docker rm -f
    fi
    stop docker TERM 20
    as_root umount "$dir"/docker/root/overlay2 2>/dev/null
  done >/dev/null 2>&1
  local pidfile pid
  for pidfile in "$WORK"/clawhq-testpg-*/*/postmaster.pid "$WORK"/clawhq-testpg-*/postmaster.pid; do
    [[ -e $pidfile ]] || continue
    pid=$(head -n 1 "$pidfile")
    as_root kill -INT "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
  done
  awk -v d="$WORK/" 'index($2, d) == 1 {print $2}' /proc/mounts | sort -r | while read -r mount; do as_root umount "$mount"; done
  as_root rm -rf --one-file-system "$WORK"
  exit "$rc"
}

cmd_test() {
  local nightly=0 begin only=''
  while (( $# )); do
    case $1 in
      --nightly) nightly=1 ;;
      --only) only=${2:?--only wants a part of a stage\'s name}; shift ;;
      *) die "./dev test knows --nightly and --only NAME." ;;
    esac
    shift
  done
  begin=$(now_ms)
  need_rust
  need_root
  need_disk 12000 "$CARGO_TARGET_DIR"
  WORK=$(mktemp -d "${TMPDIR:-/tmp}/chq.XXXXXX")
  # PostgreSQL's unprivileged user passes through.
  chmod 711 "$WORK"
  trap test_ended EXIT
  trap interrupted INT TERM
  say "${B}Preparing${N}"
  install_missing build run test
  need_node
  need_components
  need_nextest
  need_kosoku
  # Real parts, private to this run: a Docker daemon and a PostgreSQL in a temporary directory.
  unset DATABASE_URL DOCKER_HOST
  DATA=$WORK
  mkdir -p "$WORK/run" "$WORK/log"
  as_root mkdir -p "$WORK/docker"
  need_docker
  build_web
  build_rust
  step "Image hello built" image-hello build_image hello
  # Tests' temporary files, among them the PostgreSQL that they start and share, go with this run.
  export TMPDIR=$WORK CLAWHQ_TEST_DOCKER_HOST=$DOCKER_HOST CLAWHQ_TEST_DOCKER=$DOCKER_HOST CLAWHQ_BIN=$BIN

  run_stage() { [[ -z $only || $1 == *"$only"* ]] || return 0; stage "$@"; }
  run_stage "scripts" suite_scripts
  run_stage "rustfmt" cargo fmt --all --check
  run_stage "clippy" cargo clippy --locked --quiet --workspace --all-targets -- -D warnings
  if (( nightly )); then
    export NIGHTLY=1
    run_stage "rust tests, the long ones too" suite_rust --profile nightly --run-ignored all
  else
    run_stage "rust tests" suite_rust
  fi
  run_stage "rust doc tests" suite_doc
  run_stage "openapi: no drift" suite_openapi
  run_stage "console: types and lint" npm --prefix web run --silent check
  run_stage "console: unit tests" counted npm --prefix web run --silent test
  run_stage "console in Chromium, against a real ClawHQ" suite_e2e

  printf '\n'
  printf '%s\n' "${STAGES[@]}"
  printf '%s%s%s\n' "$D" "$(seconds $(( $(now_ms) - begin )))" "$N"
  if (( PASSED + FAILED == 0 )); then die "No stage is called $only."; fi
  printf '%d passed, %d failed\n' "$PASSED" "$FAILED"
  (( FAILED == 0 ))
}

# ---------------------------------------------------------------------------------------------------- openapi

cmd_openapi() {
  local check=0 out
  case ${1:-} in '') ;; --check) check=1 ;; *) die "./dev openapi knows only --check." ;; esac
  need_rust
  need_node
  cargo build --locked --quiet -p clawhq
  out=$(mktemp -d)
  "$BIN" openapi --out "$out"
  if (( check )); then
    diff -ru openapi "$out" || { rm -rf "$out"; die "openapi/ is not what the code says: run ./dev openapi and commit it."; }
  else
    mkdir -p openapi
    cp "$out"/*.json openapi/
  fi
  rm -rf "$out"
  npm --prefix web/tools ci "${NPM_FLAGS[@]}" >/dev/null
  if (( check )); then npm --prefix web run --silent schema:check; else npm --prefix web run --silent schema; fi
}

# ---------------------------------------------------------------------------------------------------- bench

cmd_bench() {
  local name=${1:-} found=0 program
  (( $# )) && shift
  need_rust
  need_root
  install_missing build bench
  for program in bench/*/run workloads/*/bench/run; do
    [[ -x $program ]] || continue
    local this=${program%/run}
    this=${this%/bench}
    this=${this##*/}
    # `hub` is enough for proxy-hub.
    [[ -z $name || $this = "$name" || $this = *-"$name" ]] || continue
    found=1
    printf '\n%s▸ %s%s\n' "$B" "$this" "$N"
    "$program" "$@"
  done
  (( found )) || die "There is no benchmark ${name:-yet}."
}
