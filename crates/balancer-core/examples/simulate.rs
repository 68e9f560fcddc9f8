//! Simulates a job without a cluster: executors are added, spot executors are reclaimed, more are added. It shows how
//! the ledger keeps the ratio.
//!
//! ```sh
//! cargo run --example simulate -- 0.7 2    # ratio, on-demand base
//! ```

use balancer_core::{
    Capacity, Counts, InvalidField, JobLedger, PlaceOutcome, PlaceRequest, Policy, PolicyField, PolicyOverrides,
};

struct Simulation {
    ledger: JobLedger,
    policy: Policy,
    next: u64,
}

impl Simulation {
    /// Adds executors with the names that Spark gives them.
    fn add(&mut self, executors: u64) {
        for number in self.next..self.next + executors {
            let name = format!("etl-exec-{number}");
            let request = PlaceRequest {
                key: &name,
                required: None,
                overrides: PolicyOverrides::default(),
                policy: Some(self.policy),
                may_create: true,
                driver: None,
            };
            if let PlaceOutcome::Placed(placed) = self.ledger.place(&request, number) {
                print!("{}", if placed.capacity == Capacity::Spot { 's' } else { 'D' });
            }
        }
        self.next += executors;
        self.report(&format!("+{executors}"));
    }

    /// Removes spot executors, as if the cloud had reclaimed them.
    fn reclaim(&mut self, executors: usize) {
        let gone: Vec<String> = self
            .ledger
            .entries()
            .iter()
            .filter(|(_, entry)| entry.capacity == Capacity::Spot)
            .map(|(name, _)| name.clone())
            .take(executors)
            .collect();
        for name in &gone {
            self.ledger.release(name, None, 0);
        }
        self.report(&format!("-{} spot", gone.len()));
    }

    fn report(&self, what: &str) {
        let Counts { spot, on_demand } = self.ledger.counts();
        let beyond_base = (spot + on_demand).saturating_sub(u64::from(self.policy.on_demand_base));
        #[expect(clippy::cast_precision_loss, reason = "for people to read")]
        let share = spot as f64 / beyond_base.max(1) as f64;
        println!("\n{what:>9}: {spot} spot, {on_demand} on-demand; spot is {share:.3} of those beyond the base");
    }
}

fn main() -> Result<(), InvalidField> {
    let mut arguments = std::env::args().skip(1);
    let spot_ratio = arguments.next().unwrap_or_else(|| "0.7".into());
    let on_demand_base = arguments.next().unwrap_or_else(|| "0".into());
    let (overrides, invalid) = PolicyOverrides::parse(|field| match field {
        PolicyField::SpotRatio => Some(spot_ratio.as_str()),
        PolicyField::OnDemandBase => Some(on_demand_base.as_str()),
        #[allow(unreachable_patterns, reason = "other fields have their defaults")]
        _ => None,
    });
    if let Some(invalid) = invalid.into_iter().next() {
        return Err(invalid);
    }
    let policy = overrides.or_default(Policy::default());
    println!("{policy}\n");
    let mut job = Simulation { ledger: JobLedger::default(), policy, next: 1 };
    job.add(40);
    job.reclaim(14);
    job.add(10);
    job.add(30);
    Ok(())
}
