//! Warns the people whose jobs do not run as they have stated: in the log, and by Events on the drivers. Only the leader
//! does.

use balancer_core::{JobId, Policy, PolicyField, PolicyOverrides};
use balancer_store::Ledger;
use tokio::time::Instant;

use crate::events::{Warning, WarningReason};
use crate::index::{FixedCapacity, InvalidAnnotation};
use crate::state::{Parts, State};

impl<L: Ledger> State<'_, L> {
    /// Reports the annotations that became invalid.
    pub(crate) fn report_invalid_annotations(&mut self) {
        if !self.terms.leads() {
            return;
        }
        let Parts { metrics, conventions, .. } = &self.reconciler.parts;
        // The others wait in the index.
        let most = self.events.room() / PolicyField::ALL.len();
        for annotation in self.index.take_invalid_annotations(most) {
            let InvalidAnnotation { job, driver, invalid, .. } = &annotation;
            let job = job.as_ref().map(|job| job.app_id.as_str());
            for invalid in invalid {
                metrics.invalid(invalid.field);
                let (key, fallback) = (conventions.annotation(invalid.field), annotation.fallback(invalid));
                let (namespace, name) = (&driver.namespace, &driver.name);
                tracing::warn!(namespace, job, driver = name, annotation = key, %invalid, fallback, "invalid annotation");
                self.events.record(Warning {
                    driver: driver.clone(),
                    reason: WarningReason::InvalidAnnotation(invalid.field.event_reason()),
                    about: invalid.to_string(),
                    note: format!("{key}: {invalid}; {fallback}"),
                });
            }
        }
    }

    /// Reports, once for each job, that all of its executors require a capacity by themselves, whatever ratio was stated.
    pub(crate) fn report_without_effect(&mut self, job: &JobId, fixed: FixedCapacity, policy: Policy) {
        let Parts { conventions, defaults, .. } = &self.reconciler.parts;
        if !fixed.contradicts(policy, *defaults) {
            return;
        }
        let Some(driver) = self.index.driver(job) else { return };
        // A later reconcile of the job reports it if there is no room.
        if self.events.room() == 0 || !self.index.report_once(job) {
            return;
        }
        let (capacity, values) = (fixed.capacity, PolicyOverrides::from(policy));
        let stated = |field| Some(format!("{}: {}", conventions.annotation(field), values.value(field)?));
        let stated: Vec<_> = PolicyField::DECIDING.iter().filter_map(|field| stated(*field)).collect();
        let (namespace, app_id, name) = (&job.namespace, &job.app_id, &driver.name);
        tracing::warn!(namespace, job = app_id, driver = name, %policy, %capacity, "the ratio has no effect");
        self.events.record(Warning {
            driver,
            reason: WarningReason::SpotRatioWithoutEffect,
            about: app_id.clone(),
            note: format!(
                "{} has no effect, because the executors' own nodeSelector or affinity requires {capacity}",
                stated.join(", ")
            ),
        });
    }

    /// Reports, once for each driver, executors that have been unschedulable for too long, and shows how many there are.
    pub(crate) fn report_unschedulable(&mut self) {
        if !self.terms.leads() {
            return;
        }
        let now = Instant::now();
        let is_synced = |namespace: &str| self.sync.is_synced(namespace);
        self.reconciler.parts.metrics.set_unschedulable(self.waiting.unschedulable.overdue(now, is_synced));
        for report in self.waiting.unschedulable.take_reports(now, self.events.room(), is_synced) {
            let (note, about, driver) = (report.note(), report.about(), report.driver);
            tracing::warn!(namespace = driver.namespace, driver = driver.name, note, "executors are unschedulable");
            let reason = WarningReason::ExecutorsUnschedulable;
            self.events.record(Warning { driver, reason, about, note });
        }
    }
}
