//! Checks the annotations of live drivers.

use crate::check::problem::{Finding, Problem};
use crate::check::snapshot::Snapshot;

/// The values are valid.
pub(super) fn annotations(snapshot: &Snapshot) -> Vec<Finding> {
    let conventions = snapshot.settings().conventions;
    let drivers = snapshot.drivers.iter().filter(|driver| driver.is_live());
    drivers
        .flat_map(|driver| {
            let metadata = &driver.metadata;
            let namespace = metadata.namespace.as_deref().unwrap_or_default();
            let name = metadata.name.as_deref().unwrap_or_default();
            let (_, invalid) = conventions.overrides(driver);
            let finding = |invalid: balancer_core::InvalidField| {
                let annotation = conventions.annotation(invalid.field);
                let text = format!("{annotation}: {invalid}.");
                let fix =
                    "Correct the annotation on the driver, which takes effect at once, and in what submits the job.";
                Finding::new(Problem::InvalidAnnotation, format!("Pod {namespace}/{name}"), text, fix)
            };
            invalid.into_iter().map(finding).collect::<Vec<_>>()
        })
        .collect()
}
