//! What the webhook decided about a pod and wrote into it, and why it left it alone.

use std::cmp::Ordering;

use balancer_core::{Capacity, Conventions, DriverCapacity, NodeRequirements, PolicyField, SpotRatio, Toleration};
use k8s_openapi::api::core::v1;

use crate::output::percent;
use crate::snapshot::{SpotState, created};
use crate::status::job::JobStatus;

use super::words::{Outcome, Subject};

const HOSTNAME: &str = "kubernetes.io/hostname";
const INSTANCE_TYPE: &str = "node.kubernetes.io/instance-type";

impl Subject<'_> {
    pub(super) fn decision_words(&self) -> Vec<String> {
        match self.outcome {
            Outcome::Placed => self.placed_words(),
            Outcome::Fixed => self.fixed_words(),
            Outcome::OptedOut => vec![format!(
                "None: {}. Executors that are opted out are neither changed nor counted.",
                self.opted_out_by()
            )],
            Outcome::NoJobId => vec!["None: the webhook changes no executor without a job id.".into()],
            Outcome::NotPlaced => self.not_placed_words(),
            Outcome::NotRecorded => self.not_recorded_words(),
            Outcome::Driver => self.driver_words(),
            Outcome::Owner => {
                let first = "It is not placed itself. Its annotations are the policy of the executors that it owns.";
                [first.to_owned()].into_iter().chain(self.not_sent_words()).collect()
            }
            Outcome::OtherRole => vec!["None: the webhook changes no such pod.".into()],
        }
    }

    fn requirements(&self) -> NodeRequirements {
        self.conventions().profile().requirements(self.core)
    }

    fn placed_words(&self) -> Vec<String> {
        let capacity = self.capacity.map_or("unknown", Capacity::as_str);
        let annotation = self.conventions().decision_annotation.as_deref().unwrap_or_default();
        let value = self.core.annotation(annotation).unwrap_or_default();
        let mut words = vec![format!("To {capacity}: the webhook wrote the annotation {annotation}: {value}.")];
        let NodeRequirements { ours, own, .. } = self.requirements();
        match (ours.is_empty(), self.capacity) {
            (false, _) => words.push(format!("It added that the node must have {}.", ours.join(" and "))),
            (true, Some(Capacity::Spot)) => {
                words.push(
                    "It added no requirement: the pod prefers spot, and may run on on-demand too (BEST_EFFORT).".into(),
                );
            }
            (true, _) => {
                words.push("The pod has no requirement of that any more: another webhook may have removed it.".into())
            }
        }
        if !own.is_empty() {
            words.push(format!("The pod itself requires {}.", own.join(" and ")));
        }
        words.extend(self.toleration_words());
        words.extend(self.spread_words());
        words.extend(self.status.as_ref().and_then(|status| self.ratio_words(status)));
        words.extend(self.spot_words());
        words
    }

    /// The tolerations for spot that it has.
    fn toleration_words(&self) -> Option<String> {
        let own = self.pod.spec.as_ref()?.tolerations.as_deref()?;
        let ours = &self.conventions().capacity_labels.spot_tolerations;
        let written: Vec<String> =
            ours.iter().filter(|ours| own.iter().any(|own| is_same(own, ours))).map(describe).collect();
        let is_spot = self.capacity == Some(Capacity::Spot) && !written.is_empty();
        is_spot.then(|| format!("It tolerates {}.", written.join(" and ")))
    }

    /// How the webhook keeps it away from the job's other executors, or from an instance type. What the pod has of that
    /// kind by itself is not the webhook's.
    fn spread_words(&self) -> Vec<String> {
        let mut words = Vec::new();
        let Some(spec) = &self.pod.spec else { return words };
        if !self.conventions().profile().spreads_itself(self.core) {
            let limits = spec.topology_spread_constraints.iter().flatten().filter(|constraint| {
                constraint.topology_key == HOSTNAME && constraint.when_unsatisfiable == "DoNotSchedule"
            });
            let limit = |limit: &v1::TopologySpreadConstraint| {
                format!("At most {} of the job's executors may be on one node.", limit.max_skew)
            };
            words.extend(limits.map(limit));
        }
        let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
        let preferred =
            affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_ref());
        words.extend(preferred.into_iter().flatten().filter_map(|term| self.avoid_words(term)));
        words
    }

    /// The webhook prefers spot nodes without some instance types. A preference for other nodes is the pod's own.
    fn avoid_words(&self, term: &v1::PreferredSchedulingTerm) -> Option<String> {
        let Some([spot, avoided]) = term.preference.match_expressions.as_deref() else { return None };
        let is_ours = spot.key == self.conventions().capacity_labels.label
            && (avoided.key.as_str(), avoided.operator.as_str()) == (INSTANCE_TYPE, "NotIn");
        let types = avoided.values.as_deref().unwrap_or_default().join(" and ");
        is_ours.then(|| {
            format!("It rather avoids {types}: too many of the job's executors were in one pool of that type.")
        })
    }

    /// How the job stands now. The counts at the time of the decision are not recorded.
    fn ratio_words(&self, status: &JobStatus) -> Option<String> {
        let (spot, on_demand) = (status.spot + status.pending_spot, status.on_demand + status.pending_on_demand);
        let have = format!("The job now has {spot} on spot and {on_demand} on on-demand, pending ones included");
        let (wanted, ratio) = (status.wanted_spot?, status.spot_ratio?);
        let base = status.on_demand_base.filter(|base| *base > 0).map(|base| format!(" beyond a base of {base}"));
        let distance = status.distance_words();
        Some(format!(
            "{have}; {}{} would be {wanted:.1} on spot (distance {distance}).",
            percent(ratio),
            base.unwrap_or_default()
        ))
    }

    /// What a closed spot means for the decision.
    fn spot_words(&self) -> Option<String> {
        let SpotState::Closed(since) = self.spot_state() else { return None };
        // A pod's creation is known to the second.
        let created = created(self.core)?;
        let text = match (self.capacity, created.as_second().cmp(&since.as_second())) {
            (_, Ordering::Less) => "Spot was closed to the job after it was created.",
            (Some(Capacity::OnDemand), Ordering::Greater) => {
                "Spot was closed to the job when it was created, so it went to on-demand whatever the ratio is."
            }
            (Some(Capacity::Spot), Ordering::Greater) => {
                "Spot is closed to the job: this executor probes whether there is spot again."
            }
            (_, _) => "Spot was closed to the job in the second in which it was created.",
        };
        Some(text.into())
    }

    fn fixed_words(&self) -> Vec<String> {
        let capacity = self.capacity.map_or("unknown", Capacity::as_str);
        vec![
            format!("To {capacity}, by the pod itself: it requires {}.", self.requirements().own.join(" and ")),
            "The webhook leaves such an executor where it wants to be, and counts it. No ratio applies to it.".into(),
        ]
    }

    fn opted_out_by(&self) -> String {
        let annotation = self.conventions().annotation(PolicyField::SpotRatio);
        let driver = self.driver.as_ref().map_or("its driver", |driver| &driver.name);
        if self.own.spot_ratio == Some(SpotRatio::Off) {
            format!("its own annotation {annotation} is off")
        } else if self.policy.source == crate::snapshot::RatioSource::Default {
            format!("{driver} states no ratio, and DEFAULT_SPOT_RATIO is none")
        } else {
            format!("the annotation {annotation} of {driver} is off")
        }
    }

    fn not_placed_words(&self) -> Vec<String> {
        let annotation = self.conventions().decision_annotation.as_deref().unwrap_or_default();
        let mut words = vec![format!("None: it has no annotation {annotation}, so no webhook has placed it.")];
        let registered = self.snapshot.registered;
        if let Some(not_sent) = self.not_sent_words() {
            words.push(not_sent);
            return words;
        }
        if let (Some(created), Some(registered)) = (created(self.core), registered)
            && created < registered
        {
            words.push("It was created before the webhook was registered. Only new executors are placed.".into());
            return words;
        }
        if self.is_bound_without_scheduler() {
            words.push("It was created with a nodeName, and such an executor is left alone.".into());
            return words;
        }
        let then =
            if self.snapshot.is_selected.is_none() { "is not sent to the webhook" } else { "was not sent to it then" };
        let before = if registered.is_none() { "it was created before Spot Balancer was installed; " } else { "" };
        words.push(format!(
            "Possible causes: {before}the webhook did not answer, and the apiserver created the pod without it \
             (failurePolicy Ignore); the namespace {then}; the job had the ratio off then."
        ));
        words
    }

    /// That the webhook is not asked, if that is known.
    fn not_sent_words(&self) -> Option<String> {
        (self.snapshot.is_selected == Some(false)).then(|| {
            "The namespace is not sent to the webhook (the namespaceSelector of its configuration), so its executors are \
             created unchanged."
                .to_owned()
        })
    }

    /// Whether the pod has a node, and no scheduler has said so.
    fn is_bound_without_scheduler(&self) -> bool {
        let conditions = self.pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        self.node().is_some() && !conditions.iter().any(|condition| condition.type_ == "PodScheduled")
    }

    fn not_recorded_words(&self) -> Vec<String> {
        let NodeRequirements { own, .. } = self.requirements();
        let first =
            "Unknown: by its setting DECISION_ANNOTATION the webhook leaves no mark on the executors that it places.";
        let mut words = vec![first.to_owned()];
        if !own.is_empty() {
            words.push(format!("The pod requires {}, by itself or because of the webhook.", own.join(" and ")));
        }
        words
    }

    fn driver_words(&self) -> Vec<String> {
        let Conventions { driver_capacity, .. } = self.conventions();
        let mut words =
            vec!["A driver is not placed by a ratio. The webhook reads its annotations when it is created.".to_owned()];
        let NodeRequirements { ours, own, .. } = self.requirements();
        let required: Vec<String> = ours.into_iter().chain(own).collect();
        match (self.capacity, driver_capacity) {
            (Some(capacity), DriverCapacity::OnDemand) => words.push(format!(
                "It must run on {capacity}, by itself or by DRIVER_CAPACITY=on-demand: it requires {}.",
                required.join(" and ")
            )),
            (Some(capacity), DriverCapacity::Any) => {
                words.push(format!("It must run on {capacity}: it requires {}.", required.join(" and ")));
            }
            (None, _) => words.push("It may run on spot, and its job ends if its node is reclaimed.".into()),
        }
        words.extend(self.not_sent_words());
        words
    }
}

fn is_same(own: &v1::Toleration, ours: &Toleration) -> bool {
    own.key.as_ref() == Some(&ours.key) && own.value == ours.value && own.effect.as_ref() == Some(&ours.effect)
}

fn describe(toleration: &Toleration) -> String {
    let value = toleration.value.as_ref().map(|value| format!("={value}")).unwrap_or_default();
    format!("{}{value}:{}", toleration.key, toleration.effect)
}
