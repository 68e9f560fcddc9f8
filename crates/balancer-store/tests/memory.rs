//! The memory ledger keeps the contract.

use std::time::Duration;

use balancer_store::MemoryLedger;

balancer_store::contract!(MemoryLedger::new(Duration::from_secs(60)));
