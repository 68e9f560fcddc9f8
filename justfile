# Shortcuts for the scripts and commands that CI runs. `just` lists them; `.ci/tool just` prints the path of a copy.

_list:
    @{{ quote(just_executable()) }} --list --unsorted

# Format all Rust code
fmt:
    cargo fmt --all
    cargo fmt --manifest-path fuzz/Cargo.toml

# Run every check that is not a test
lint:
    .ci/lint

# Install the real parts and run all tests, or those that ARGUMENTS of cargo test select
test *ARGUMENTS:
    tests/run {{ ARGUMENTS }}

# Run the tests of one file of tests/tests whose names contain NAME: just test-one placing ratio
test-one FILE NAME='':
    tests/run --test {{ quote(FILE) }} -- {{ NAME }}

# Run the tests that need no server
unit:
    cargo test --locked --workspace --lib --bins

# Run mixed load on the real parts for SECONDS, while the store, the leader, certificates and tokens change
soak SECONDS='1800':
    tests/soak {{ SECONDS }}

# Measure CPU per admission and latency: the pure part, the floor of any webhook, a real apiserver
bench:
    cargo bench --locked --package balancer-core
    cargo build --locked --profile dist --bins --package balancer-webhook --package balancer-reconcile
    cargo bench --locked --package balancer-tests --bench floor
    cargo bench --locked --package balancer-tests --bench cluster
    cargo bench --locked --package balancer-tests --bench large_jobs

# Run the end-to-end tests on the cluster of the current kubectl context (settings: deploy/e2e/README.md)
e2e:
    deploy/e2e/run

# Build and open the documentation of the crates
docs:
    RUSTDOCFLAGS='--deny warnings' cargo doc --locked --workspace --no-deps --open

# Fuzz each target, or TARGET alone, for SECONDS
fuzz SECONDS='60' *TARGET:
    .ci/fuzz {{ SECONDS }} {{ TARGET }}

# Run what every change must pass
ci:
    .ci/run

# Run the webhook on this machine, without a cluster or Redis
dev *ARGUMENTS:
    cargo run --locked -p balancer-webhook -- --dev {{ ARGUMENTS }}
