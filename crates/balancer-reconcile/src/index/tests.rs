//! The index on pods and nodes as the watches report them.

use serde_json::{Value, json};

use super::*;
use balancer_core::{InvalidField, PolicyField};

fn index() -> ClusterIndex {
    ClusterIndex::new(Arc::new(Conventions::default()), Policy::default())
}

fn job() -> JobId {
    JobId { namespace: "etl".into(), app_id: "j".into() }
}

fn apply(index: &mut ClusterIndex, name: &str, role: &str, change: impl FnOnce(&mut Value)) {
    index.apply_pod(&pod(name, role, change), None);
}

fn pod(name: &str, role: &str, change: impl FnOnce(&mut Value)) -> Pod<'static> {
    let mut pod = json!({
        "metadata": {
            "name": name, "namespace": "etl", "uid": format!("uid of {name}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"spark-role": role, "spark-app-selector": "j"},
        },
        "spec": {},
    });
    change(&mut pod);
    serde_json::from_str::<Pod<'_>>(&pod.to_string()).expect("a pod").into_owned()
}

fn apply_driver(index: &mut ClusterIndex, name: &str, annotations: Value) {
    apply(index, name, "driver", |pod| pod["metadata"]["annotations"] = annotations);
}

fn capacities(index: &ClusterIndex) -> Vec<Option<Capacity>> {
    index.keys(&job()).map(|key| index.live(&job(), &key).and_then(|live| live.capacity)).collect()
}

/// What the job's ledger should say about the job as a whole.
fn desired<'a>(index: &'a ClusterIndex, job: &JobId) -> DesiredState<'a> {
    index.desired(job, [])
}

fn policy(index: &ClusterIndex) -> Option<(String, u32)> {
    let policy = desired(index, &job()).overrides.or(None)?;
    Some((policy.spot_ratio.to_string(), policy.on_demand_base))
}

#[test]
fn a_deleted_node_keeps_its_capacity_for_the_executors_bound_to_it() {
    let mut index = index();
    index.apply_node("n", Some(Capacity::OnDemand));
    apply(&mut index, "e", "executor", |pod| {
        pod["spec"]["nodeName"] = json!("n");
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
    });
    index.delete_node("n");
    assert_eq!(capacities(&index), [Some(Capacity::OnDemand)]);
    index.init_nodes();
    index.init_nodes_done();
    assert_eq!(capacities(&index), [Some(Capacity::OnDemand)]);
    index.delete_pod("etl", "e");
    assert!(index.nodes.len() == 0, "{:?}", index.nodes);
}

#[test]
fn nodes_without_executors_are_kept_while_they_exist() {
    let mut index = index();
    for node in ["a", "b", "c"] {
        index.apply_node(node, Some(Capacity::Spot));
    }
    index.delete_node("a");
    index.init_nodes();
    index.apply_node("b", Some(Capacity::Spot));
    index.init_nodes_done();
    assert_eq!(index.nodes.len(), 1);
}

#[test]
fn deleted_pods_leave_nothing_in_the_index() {
    let mut index = index();
    for round in 0..3 {
        index.init_pods(None);
        for id in 0..10 {
            apply(&mut index, &format!("e{round}-{id}"), "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
        }
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "x"}));
        index.init_pods_done(None);
        assert_eq!(index.keys(&job()).count(), 10);
    }
    index.init_pods(None);
    index.init_pods_done(None);
    assert_eq!(counted(&index.totals(|_| None)), (0, 0));
    assert!(
        index.teams.is_empty()
            && index.groups.is_empty()
            && index.namespaces.is_empty()
            && index.nodes.len() == 0
            && index.invalid_annotations.is_empty()
    );
}

#[test]
fn a_list_of_one_namespace_does_not_affect_another() {
    let (mut index, etl) = (index(), Arc::<str>::from("etl"));
    index.init_pods(Some(&etl));
    index.apply_pod(&pod("e", "executor", |_| {}), Some(&etl));
    index.init_pods_done(Some(&etl));
    let ml = Arc::<str>::from("ml");
    index.init_pods(Some(&ml));
    index.init_pods_done(Some(&ml));
    assert!(index.contains(&job()));
}

#[test]
fn absent_fields_are_the_default_and_without_a_driver_nothing_is_stated() {
    let mut index = index();
    apply(&mut index, "e", "executor", |_| {});
    assert_eq!(desired(&index, &job()).overrides, PolicyOverrides::default());
    apply_driver(&mut index, "d", json!({"workload/spot-ratio": "0.1"}));
    assert_eq!(policy(&index), Some(("0.1".into(), 0)));
    index.delete_pod("etl", "d");
    assert_eq!(desired(&index, &job()).overrides, PolicyOverrides::default());
}

fn other_job(driver: &str) -> JobId {
    JobId::of_driver(job().as_job_ref(), driver)
}

fn created(day: u32, ratio: &str) -> impl FnOnce(&mut Value) {
    let (at, annotations) = (format!("2026-01-{day:02}T00:00:00Z"), json!({"workload/spot-ratio": ratio}));
    move |pod| {
        pod["metadata"]["creationTimestamp"] = json!(at);
        pod["metadata"]["annotations"] = annotations;
    }
}

fn owned(owner: &str) -> impl FnOnce(&mut Value) {
    let owner = json!([{"kind": "Pod", "name": owner, "uid": format!("uid of {owner}"), "controller": true}]);
    move |pod| pod["metadata"]["ownerReferences"] = owner
}

fn keys<'a>(index: &'a ClusterIndex, job: &JobId) -> Vec<&'a str> {
    let mut keys: Vec<_> = index.keys(job).filter_map(|key| Some(index.live(job, &key)?.key)).collect();
    keys.sort_unstable();
    keys
}

fn ratio(index: &ClusterIndex, job: &JobId) -> Option<String> {
    desired(index, job).overrides.spot_ratio.map(|ratio| ratio.to_string())
}

#[test]
fn several_live_drivers_with_one_job_id_are_several_jobs() {
    let mut index = index();
    apply(&mut index, "new", "driver", created(2, "0.9"));
    apply(&mut index, "e1", "executor", owned("new"));
    apply(&mut index, "e0", "executor", |_| {});
    assert_eq!(keys(&index, &job()), ["e0", "e1"]);
    assert_eq!(desired(&index, &job()).driver, Some("new"));
    index.take_changed();
    apply(&mut index, "old", "driver", created(1, "0.1"));
    apply(&mut index, "e2", "executor", owned("old"));
    assert_eq!(keys(&index, &job()), ["e0", "e2"]);
    assert_eq!(keys(&index, &other_job("new")), ["e1"]);
    assert_eq!(ratio(&index, &job()).as_deref(), Some("0.1"));
    assert_eq!(ratio(&index, &other_job("new")).as_deref(), Some("0.9"));
    assert_eq!(desired(&index, &other_job("new")).driver, Some("new"));
    let changed = index.take_changed();
    assert!(changed.contains_key(&job()) && changed.contains_key(&other_job("new")), "{changed:?}");
    assert_eq!((index.jobs().count(), index.totals(|_| None).jobs), (2, 2));
    assert!(index.contains(&other_job("new")) && !index.contains(&other_job("old")));
    assert!(index.has_executor(&other_job("new"), "e1") && !index.has_executor(&job(), "e1"));
    // The oldest ends before its executors do: the next one becomes the job of the job id.
    index.delete_pod("etl", "old");
    assert_eq!((keys(&index, &job()), keys(&index, &other_job("old"))), (vec!["e0", "e1"], vec!["e2"]));
    assert_eq!(desired(&index, &job()).driver, Some("new"));
    assert!(desired(&index, &other_job("new")).ended);
    let changed = index.take_changed();
    for changed_job in [job(), other_job("new"), other_job("old")] {
        assert!(changed.contains_key(&changed_job), "{changed_job:?} in {changed:?}");
    }
    index.delete_pod("etl", "e2");
    assert!(!index.contains(&other_job("old")));
}

#[test]
fn the_usual_job_is_one_job_and_changes_as_one() {
    let mut index = index();
    apply(&mut index, "d", "driver", created(1, "0.1"));
    apply(&mut index, "e", "executor", owned("d"));
    index.delete_pod("etl", "d");
    index.delete_pod("etl", "e");
    assert_eq!(index.take_changed().into_keys().map(|id| (*id).clone()).collect::<Vec<_>>(), [job()]);
}

#[test]
fn without_a_driver_the_owner_of_the_most_executors_is_preferred_and_then_kept() {
    let mut index = index();
    index.init_pods(None);
    for (name, owner) in [("e1", "a"), ("e2", "b"), ("e3", "b")] {
        apply(&mut index, name, "executor", owned(owner));
    }
    index.init_pods_done(None);
    assert_eq!((keys(&index, &job()), keys(&index, &other_job("a"))), (vec!["e2", "e3"], vec!["e1"]));
    for name in ["e4", "e5"] {
        apply(&mut index, name, "executor", owned("a"));
    }
    assert_eq!(keys(&index, &job()), ["e2", "e3"]);
    index.delete_pod("etl", "e2");
    index.delete_pod("etl", "e3");
    assert_eq!((keys(&index, &job()), index.jobs().count()), (vec!["e1", "e4", "e5"], 1));
    let driver = index.driver(&job()).expect("an owner");
    assert_eq!((driver.name.as_str(), driver.uid.as_str()), ("a", "uid of a"));
}

#[test]
fn only_the_first_list_prefers_the_owner_of_the_most_executors() {
    let mut index = index();
    let list = |index: &mut ClusterIndex, executors: &[(&str, &str)]| {
        index.init_pods(None);
        for (name, owner) in executors {
            apply(index, name, "executor", owned(owner));
        }
        index.init_pods_done(None);
        index.primary(job().as_job_ref()).map(|primary| primary.to_string())
    };
    let counts = [
        (vec![("e1", "a"), ("e2", "b"), ("e3", "b")], "b"),
        (vec![("e1", "a"), ("e2", "b"), ("e3", "a"), ("e4", "a")], "b"),
        (vec![("e1", "a"), ("e4", "a")], "a"),
        (vec![("e1", "a"), ("e5", "b"), ("e6", "b")], "a"),
    ];
    for (executors, primary) in counts {
        assert_eq!(list(&mut index, &executors).as_deref(), Some(primary), "{executors:?}");
    }
}

#[test]
fn the_oldest_driver_with_executors_is_preferred_else_the_newest() {
    let mut index = index();
    apply(&mut index, "old", "driver", created(1, "0.1"));
    apply(&mut index, "e0", "executor", |_| {});
    apply(&mut index, "new", "driver", created(2, "0.9"));
    let primary = |index: &ClusterIndex| {
        let primary = index.primary(job().as_job_ref()).map(|primary| primary.to_string());
        assert_eq!(desired(index, &job()).driver, primary.as_deref());
        (primary.unwrap_or_default(), ratio(index, &job()).unwrap_or_default())
    };
    let (new, old) = (("new".to_owned(), "0.9".to_owned()), ("old".to_owned(), "0.1".to_owned()));
    assert_eq!(primary(&index), new);
    apply(&mut index, "e1", "executor", owned("old"));
    assert_eq!(primary(&index), old);
    apply(&mut index, "e2", "executor", owned("new"));
    assert_eq!((primary(&index), keys(&index, &job())), (old.clone(), vec!["e0", "e1"]));
    index.delete_pod("etl", "e1");
    assert_eq!((primary(&index), keys(&index, &job())), (new, vec!["e0", "e2"]));
    index.delete_pod("etl", "new");
    assert_eq!(primary(&index), old);
}

#[test]
fn a_driver_of_many_jobs_states_the_policy_of_the_executors_that_it_owns() {
    let mut index = index();
    let server = |annotations: Value| {
        move |pod: &mut Value| {
            pod["metadata"]["labels"] = json!({"spark-role": "connect-server"});
            pod["metadata"]["annotations"] = annotations;
        }
    };
    apply(&mut index, "s", "connect-server", server(json!({"workload/spot-ratio": "0"})));
    assert_eq!((index.jobs().count(), index.take_changed().len()), (0, 0));
    apply(&mut index, "e", "executor", owned("s"));
    apply(&mut index, "e2", "executor", |pod| {
        owned("s")(pod);
        pod["metadata"]["labels"]["spark-app-selector"] = json!("k");
    });
    assert_eq!(policy(&index), Some(("0".into(), 0)));
    index.take_changed();
    apply(&mut index, "s", "connect-server", server(json!({"workload/spot-ratio": "0.3"})));
    assert_eq!((policy(&index), index.take_changed().len()), (Some(("0.3".into(), 0)), 2));
    apply(&mut index, "s", "connect-server", server(json!({"workload/spot-ratio": "x"})));
    assert_eq!(policy(&index), Some(("0.3".into(), 0)));
    let reported = index.take_invalid_annotations(usize::MAX);
    assert!(matches!(reported.as_slice(), [annotation] if annotation.job.is_none() && annotation.driver.name == "s"));
    // A driver of the job precedes it, and has its own executors.
    apply(&mut index, "d", "driver", created(1, "0.9"));
    assert_eq!((ratio(&index, &job()), ratio(&index, &other_job("s"))), (Some("0.9".into()), Some("0.3".into())));
    index.delete_pod("etl", "s");
    assert_eq!(ratio(&index, &other_job("s")), None);
}

/// The jobs, and their executors.
fn counted(totals: &Totals) -> (u64, u64) {
    (totals.jobs, totals.spot + totals.on_demand + totals.unknown)
}

#[test]
fn the_largest_namespaces_are_counted_by_themselves_and_the_others_together() {
    let mut index = index();
    for number in 0..NamespaceTotals::MAX + 3 {
        let namespace = format!("team-{number:02}");
        // The last ones have more executors.
        for executor in 0..=number / NamespaceTotals::MAX {
            apply(&mut index, &format!("e{executor}"), "executor", |pod| {
                pod["metadata"]["namespace"] = json!(namespace);
                pod["metadata"]["annotations"] = json!({"workload/capacity-type": "spot"});
            });
        }
    }
    let policy = Policy { spot_ratio: "0.5".parse().expect("a ratio"), ..Policy::DEFAULT };
    let rows = index.totals(|_| Some(policy)).namespaces;
    let row = |at: usize| (rows[at].namespace.as_str(), rows[at].executors, rows[at].spot, rows[at].wanted_spot);
    assert_eq!(rows.len(), NamespaceTotals::MAX + 1);
    assert_eq!([row(0), row(2), row(3)], [("team-20", 2, 2, 1.0), ("team-22", 2, 2, 1.0), ("team-00", 1, 1, 0.5)]);
    assert_eq!(row(NamespaceTotals::MAX), (NamespaceTotals::OTHERS, 3, 3, 1.5));
}

#[test]
fn executors_of_jobs_that_have_opted_out_are_not_counted() {
    let mut index = index();
    apply(&mut index, "d", "driver", created(1, "off"));
    apply(&mut index, "e", "executor", owned("d"));
    assert_eq!(counted(&index.totals(|_| None)), (0, 0));
    assert_eq!(ratio(&index, &job()).as_deref(), Some("off"));
    // The ledger knows the policy of an owner that is not watched.
    apply(&mut index, "e2", "executor", |pod| pod["metadata"]["labels"]["spark-app-selector"] = json!("k"));
    let off = Policy { spot_ratio: SpotRatio::Off, ..Policy::DEFAULT };
    assert_eq!(counted(&index.totals(|job| (job.app_id == "k").then_some(off))), (0, 0));
    assert_eq!(counted(&index.totals(|_| None)), (1, 1));
    // An executor that opts out leaves the job.
    apply(&mut index, "e2", "executor", |pod| {
        pod["metadata"]["labels"]["spark-app-selector"] = json!("k");
        pod["metadata"]["annotations"] = json!({"workload/spot-ratio": "off"});
    });
    assert_eq!(counted(&index.totals(|_| None)), (0, 0));
}

#[test]
fn a_ratio_is_without_effect_while_all_executors_require_the_same_capacity_by_themselves() {
    let mut index = index();
    let selects = |capacity: &'static str| {
        move |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": capacity})
    };
    let fixed = |index: &ClusterIndex| index.fixed(&job()).map(|fixed| fixed.capacity);
    apply(&mut index, "d", "driver", created(1, "0.7"));
    assert_eq!(fixed(&index), None);
    apply(&mut index, "e1", "executor", selects("spot"));
    apply(&mut index, "e2", "executor", selects("spot"));
    assert_eq!(fixed(&index), None, "too few to tell");
    apply(&mut index, "e0", "executor", selects("spot"));
    assert_eq!(fixed(&index), Some(Capacity::Spot));
    assert_eq!(index.fixed(&job()).and_then(|fixed| fixed.states_ratio), Some(true));
    assert!(index.report_once(&job()) && !index.report_once(&job()));
    // The others make up for it.
    apply(&mut index, "e3", "executor", |_| {});
    assert_eq!(fixed(&index), None);
    apply(&mut index, "e3", "executor", selects("on-demand"));
    assert_eq!(fixed(&index), None);
}

#[test]
fn nodes_whose_labels_change_change_their_jobs() {
    let mut index = index();
    apply(&mut index, "e", "executor", |pod| {
        owned("d")(pod);
        pod["spec"]["nodeName"] = json!("n");
    });
    apply(&mut index, "d", "driver", created(1, "0.7"));
    index.take_changed();
    for capacity in [Some(Capacity::Spot), Some(Capacity::OnDemand), None] {
        index.apply_node("n", capacity);
        assert_eq!(index.take_changed().into_keys().map(|id| (*id).clone()).collect::<Vec<_>>(), [job()]);
        assert_eq!(capacities(&index), [capacity]);
    }
}

mod histories {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// A pod of a history: its job id, its owner, and whether it is a driver that was created on this day.
    #[derive(Clone, Debug, PartialEq)]
    struct Known {
        app_id: u8,
        owner: Option<u8>,
        driver: Option<u32>,
    }

    #[derive(Clone, Debug)]
    enum Step {
        Apply { name: u8, known: Known },
        Delete { name: u8 },
        List,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let known = (0u8..2, prop::option::weighted(0.8, 0u8..6), prop::option::weighted(0.4, 1u32..4))
            .prop_map(|(app_id, owner, driver)| Known { app_id, owner, driver });
        prop_oneof![
            6 => (0u8..10, known).prop_map(|(name, known)| Step::Apply { name, known }),
            3 => (0u8..10).prop_map(|name| Step::Delete { name }),
            1 => Just(Step::List),
        ]
    }

    fn put(index: &mut ClusterIndex, name: u8, known: &Known) {
        let role = if known.driver.is_some() { "driver" } else { "executor" };
        apply(index, &format!("p{name}"), role, |pod| {
            pod["metadata"]["labels"]["spark-app-selector"] = json!(format!("j{}", known.app_id));
            if let Some(owner) = known.owner {
                owned(&format!("p{owner}"))(pod);
            }
            if let Some(day) = known.driver {
                created(day, "0.1")(pod);
            }
        });
    }

    /// Which ledger every executor should be in, by the rules.
    #[derive(Debug, Default)]
    struct Model {
        pods: BTreeMap<u8, Known>,
        /// The owner whose executors are the job's, by job id.
        primaries: BTreeMap<u8, u8>,
        is_listed: bool,
    }

    impl Model {
        fn delete(&mut self, name: u8) {
            self.pods.remove(&name);
            self.elect(true);
        }

        fn elect(&mut self, keep: bool) {
            for app_id in 0..2 {
                let pods = || self.pods.iter().filter(move |(_, pod)| pod.app_id == app_id);
                let executors =
                    |owner: u8| pods().filter(move |(_, pod)| pod.driver.is_none() && pod.owner == Some(owner));
                let owns = |owner: u8| executors(owner).next().is_some();
                let drivers: BTreeSet<_> = pods().filter_map(|(name, pod)| Some((pod.driver?, *name))).collect();
                let oldest = drivers.iter().find(|(_, name)| owns(*name)).or(drivers.last()).map(|(_, name)| *name);
                let kept = self.primaries.get(&app_id).copied().filter(|owner| keep && owns(*owner));
                let most = || (0..10).rev().filter(|owner| owns(*owner)).max_by_key(|owner| executors(*owner).count());
                match oldest.or(kept).or_else(most) {
                    Some(primary) => self.primaries.insert(app_id, primary),
                    None => self.primaries.remove(&app_id),
                };
            }
        }

        fn ledgers(&self) -> Ledgers {
            let mut ledgers = Ledgers::new();
            for (name, pod) in self.pods.iter().filter(|(_, pod)| pod.driver.is_none()) {
                let job = JobId { namespace: "etl".into(), app_id: format!("j{}", pod.app_id) };
                let job = match pod.owner.filter(|owner| self.primaries.get(&pod.app_id) != Some(owner)) {
                    Some(owner) => JobId::of_driver(job.as_job_ref(), &format!("p{owner}")),
                    None => job,
                };
                ledgers.entry(job).or_default().insert(format!("p{name}"));
            }
            ledgers
        }
    }

    /// What each job's ledger has, if only the changed jobs are reconciled.
    type Ledgers = BTreeMap<JobId, BTreeSet<String>>;

    fn reconcile(index: &mut ClusterIndex, ledgers: &mut Ledgers) {
        for job in index.take_changed().into_keys() {
            let keys: BTreeSet<_> = keys(index, &job).into_iter().map(str::to_owned).collect();
            if keys.is_empty() {
                ledgers.remove(&*job);
            } else {
                ledgers.insert((*job).clone(), keys);
            }
        }
    }

    proptest! {
        #[test]
        fn every_live_executor_is_in_exactly_one_ledger(steps in prop::collection::vec(steps(), 0..60)) {
            let (mut index, mut ledgers) = (index(), Ledgers::new());
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Apply { name, known } => {
                        put(&mut index, name, &known);
                        if model.pods.get(&name) != Some(&known) {
                            model.delete(name);
                            model.pods.insert(name, known);
                            model.elect(true);
                        }
                    }
                    Step::Delete { name } => {
                        index.delete_pod("etl", &format!("p{name}"));
                        model.delete(name);
                    }
                    Step::List => {
                        index.init_pods(None);
                        model.pods.iter().for_each(|(name, known)| put(&mut index, *name, known));
                        index.init_pods_done(None);
                        model.elect(model.is_listed);
                        model.is_listed = true;
                    }
                }
                reconcile(&mut index, &mut ledgers);
                prop_assert_eq!(&ledgers, &model.ledgers());
                let jobs: BTreeSet<JobId> = index.jobs().map(|job| (**job).clone()).collect();
                prop_assert_eq!(jobs.len(), index.jobs().count());
                for job in ledgers.keys() {
                    prop_assert!(jobs.contains(job) && index.contains(job));
                }
            }
            for name in model.pods.into_keys() {
                index.delete_pod("etl", &format!("p{name}"));
            }
            prop_assert!(index.teams.is_empty() && index.groups.is_empty() && index.namespaces.is_empty());
        }
    }
}

mod relists {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use proptest::prelude::*;

    use super::*;

    const NAMESPACES: [&str; 2] = ["etl", "ml"];
    /// The watches: of the pods of each namespace, and of the nodes.
    const NODES: usize = NAMESPACES.len();
    const WATCHES: usize = NODES + 1;

    /// What happens to a cluster, what its watches report of it, and what the lists under way do.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Create {
            id: PodId,
        },
        Bind {
            id: PodId,
            node: u8,
        },
        /// The pod ends, and exists until it is deleted.
        End {
            id: PodId,
        },
        Delete {
            id: PodId,
        },
        SetNode {
            node: u8,
            capacity: Option<Capacity>,
        },
        DeleteNode {
            node: u8,
        },
        /// The watch reports the next change.
        Report(usize),
        /// The watch leaves a change out.
        Lose(usize),
        /// A list starts next to the watch.
        Start(usize),
        Page {
            of: usize,
            items: usize,
        },
        Fail(usize),
        /// The watch cannot go on: all that it has not reported is lost, and it needs a list of its own.
        Expire(usize),
    }

    /// The number of a namespace and that of a pod. The last pods are drivers.
    type PodId = (usize, u8);

    const EXECUTORS: u8 = 4;
    const PODS: u8 = 6;

    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Known {
        uid: u32,
        node: Option<u8>,
        is_ending: bool,
    }

    #[derive(Clone, Debug)]
    enum Event {
        Pod(PodId, Known),
        /// A pod is gone, and its uid.
        PodGone(PodId, u32),
        Node(u8, Option<Option<Capacity>>),
    }

    /// A list of the state at its start, and what is left of it.
    struct List {
        items: Vec<Event>,
        /// Whether a change was left out before.
        had_lost: bool,
    }

    #[derive(Default)]
    struct Watch {
        events: VecDeque<Event>,
        list: Option<List>,
        has_lost: bool,
        /// Whether it reports nothing before the end of a list of its own.
        is_expired: bool,
    }

    #[derive(Default)]
    struct World {
        pods: BTreeMap<PodId, Known>,
        nodes: BTreeMap<u8, Option<Capacity>>,
        made: u32,
        watches: [Watch; WATCHES],
        /// The uids of which a watch has said that they are gone.
        gone: BTreeSet<String>,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let (id, node, watch) = (|| (0..NAMESPACES.len(), 0..PODS), || 0u8..3, || 0..WATCHES);
        let capacity = prop::option::of(prop_oneof![Just(Capacity::Spot), Just(Capacity::OnDemand)]);
        prop_oneof![
            6 => id().prop_map(|id| Step::Create { id }),
            4 => (id(), node()).prop_map(|(id, node)| Step::Bind { id, node }),
            3 => id().prop_map(|id| Step::End { id }),
            6 => id().prop_map(|id| Step::Delete { id }),
            2 => (node(), capacity).prop_map(|(node, capacity)| Step::SetNode { node, capacity }),
            2 => node().prop_map(|node| Step::DeleteNode { node }),
            12 => watch().prop_map(Step::Report),
            1 => watch().prop_map(Step::Lose),
            6 => watch().prop_map(Step::Start),
            9 => (watch(), 1usize..4).prop_map(|(of, items)| Step::Page { of, items }),
            1 => watch().prop_map(Step::Fail),
            1 => watch().prop_map(Step::Expire),
        ]
    }

    fn scope(watch: usize) -> Option<Arc<str>> {
        NAMESPACES.get(watch).map(|namespace| Arc::from(*namespace))
    }

    fn name((_, pod): PodId) -> String {
        format!("p{pod}")
    }

    fn as_pod(id: PodId, known: &Known) -> Pod<'static> {
        let role = if id.1 < EXECUTORS { "executor" } else { "driver" };
        pod(&name(id), role, |pod| {
            pod["metadata"]["namespace"] = json!(NAMESPACES[id.0]);
            pod["metadata"]["uid"] = json!(known.uid.to_string());
            if let Some(node) = known.node {
                pod["spec"]["nodeName"] = json!(format!("n{node}"));
            }
            if known.is_ending {
                pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
        })
    }

    /// The uid and the node of a pod, as the index has them.
    fn known(index: &ClusterIndex, (namespace, pod): PodId) -> Option<(String, Option<String>)> {
        let (namespace, name) = (NAMESPACES[namespace], name((namespace, pod)));
        let uid = index.uid(namespace, &name)?.to_owned();
        let executor = index.executor(&JobId { namespace: namespace.into(), ..job() }, &name);
        Some((uid, executor.and_then(|(_, executor)| executor.node.as_deref().map(str::to_owned))))
    }

    /// Whether the index knows another pod of this name.
    fn is_other(index: &ClusterIndex, id: PodId, uid: u32) -> bool {
        known(index, id).is_some_and(|(known, _)| known != uid.to_string())
    }

    fn pod_ids() -> impl Iterator<Item = PodId> {
        (0..NAMESPACES.len()).flat_map(|namespace| (0..PODS).map(move |pod| (namespace, pod)))
    }

    impl World {
        fn step(&mut self, index: &mut ClusterIndex, step: Step) {
            match step {
                Step::Create { id } => {
                    if !self.pods.contains_key(&id) {
                        self.made += 1;
                        self.pods.insert(id, Known { uid: self.made, node: None, is_ending: false });
                        self.changed(id);
                    }
                }
                Step::Bind { id, node } => {
                    if let Some(known) = self.pods.get_mut(&id).filter(|known| known.node.is_none()) {
                        known.node = Some(node);
                        self.changed(id);
                    }
                }
                Step::End { id } => {
                    if let Some(known) = self.pods.get_mut(&id) {
                        known.is_ending = true;
                        self.changed(id);
                    }
                }
                Step::Delete { id } => {
                    let gone = self.pods.remove(&id);
                    self.watches[id.0].events.extend(gone.map(|gone| Event::PodGone(id, gone.uid)));
                }
                Step::SetNode { node, capacity } => {
                    self.nodes.insert(node, capacity);
                    self.watches[NODES].events.push_back(Event::Node(node, Some(capacity)));
                }
                Step::DeleteNode { node } => {
                    let gone = self.nodes.remove(&node);
                    self.watches[NODES].events.extend(gone.map(|_| Event::Node(node, None)));
                }
                Step::Report(watch) => {
                    if !self.watches[watch].is_expired
                        && let Some(event) = self.watches[watch].events.pop_front()
                    {
                        self.report(index, event);
                    }
                }
                Step::Lose(watch) => {
                    let watch = &mut self.watches[watch];
                    watch.has_lost |= watch.events.pop_front().is_some();
                }
                Step::Start(watch) => {
                    if self.watches[watch].list.is_none() {
                        self.start(index, watch);
                    }
                }
                Step::Page { of, items } => (0..items).for_each(|_| self.page(index, of)),
                Step::Fail(at) => {
                    let watch = &mut self.watches[at];
                    if let Some(list) = watch.list.take() {
                        watch.has_lost |= list.had_lost;
                        // A list of the watch's own that fails starts anew.
                        match scope(at) {
                            _ if watch.is_expired => {}
                            Some(scope) => index.init_pods_failed(Some(&scope)),
                            None => index.init_nodes_failed(),
                        }
                    }
                }
                // The list that was under way is given up without a word.
                Step::Expire(watch) => {
                    self.watches[watch].is_expired = true;
                    self.start(index, watch);
                }
            }
        }

        fn changed(&mut self, id: PodId) {
            let now = self.pods.get(&id).map(|now| Event::Pod(id, now.clone()));
            self.watches[id.0].events.extend(now);
        }

        fn start(&mut self, index: &mut ClusterIndex, at: usize) {
            let watch = &mut self.watches[at];
            if watch.is_expired {
                // The watch goes on from the state of the list.
                watch.events.clear();
            }
            let had_lost = std::mem::take(&mut watch.has_lost);
            let items: Vec<_> = match scope(at) {
                Some(scope) => {
                    index.init_pods(Some(&scope));
                    let pods = self.pods.iter().filter(|(id, _)| id.0 == at);
                    pods.map(|(id, known)| Event::Pod(*id, known.clone())).collect()
                }
                None => {
                    index.init_nodes();
                    self.nodes.iter().map(|(node, capacity)| Event::Node(*node, Some(*capacity))).collect()
                }
            };
            watch.list = Some(List { items, had_lost });
        }

        fn report(&mut self, index: &mut ClusterIndex, event: Event) {
            match event {
                Event::Pod(id, now) => {
                    let is_other = is_other(index, id, now.uid);
                    index.apply_pod(&as_pod(id, &now), scope(id.0).as_ref());
                    if now.is_ending {
                        assert_eq!(known(index, id).is_some(), is_other, "another pod of this name stays");
                    }
                }
                Event::PodGone(id, uid) => {
                    let is_other = is_other(index, id, uid);
                    index.delete_watched_pod(NAMESPACES[id.0], &name(id), &uid.to_string());
                    assert_eq!(known(index, id).is_some(), is_other, "another pod of this name stays");
                    self.gone.insert(uid.to_string());
                }
                Event::Node(node, Some(capacity)) => index.apply_node(&format!("n{node}"), capacity),
                Event::Node(node, None) => index.delete_node(&format!("n{node}")),
            }
        }

        fn page(&mut self, index: &mut ClusterIndex, at: usize) {
            let watch = &mut self.watches[at];
            let Some(list) = &mut watch.list else { return };
            match (list.items.pop(), scope(at)) {
                (Some(Event::Pod(id, known)), scope) => {
                    index.list_pod(&as_pod(id, &known), scope.as_ref());
                }
                (Some(Event::Node(node, Some(capacity))), _) => {
                    let name = format!("n{node}");
                    if !index.is_known_better(&name) {
                        index.apply_node(&name, capacity);
                    }
                }
                (Some(_), _) => unreachable!("a list has nothing that is gone"),
                (None, scope) => {
                    match scope {
                        Some(scope) => index.init_pods_done(Some(&scope)),
                        None => index.init_nodes_done(),
                    }
                    (watch.list, watch.is_expired) = (None, false);
                }
            }
        }

        /// All that the lists and the watches have still to report is reported.
        fn finish(&mut self, index: &mut ClusterIndex) {
            for at in 0..WATCHES {
                if self.watches[at].is_expired && self.watches[at].list.is_none() {
                    self.start(index, at);
                }
                while self.watches[at].is_expired {
                    self.page(index, at);
                }
                while let Some(event) = self.watches[at].events.pop_front() {
                    self.report(index, event);
                }
                while self.watches[at].list.is_some() {
                    self.page(index, at);
                }
            }
        }

        /// The index is what it would be if it had seen this state alone, as far as no change was left out after the last list.
        fn expect_in(&self, index: &ClusterIndex) {
            let mut fresh = super::index();
            self.nodes.iter().for_each(|(node, capacity)| fresh.apply_node(&format!("n{node}"), *capacity));
            self.pods.iter().for_each(|(id, now)| fresh.apply_pod(&as_pod(*id, now), scope(id.0).as_ref()));
            for id in pod_ids().filter(|id| !self.watches[id.0].has_lost) {
                assert_eq!(known(index, id), known(&fresh, id), "{id:?}");
            }
            if !self.watches[NODES].has_lost {
                for (node, capacity) in &self.nodes {
                    assert_eq!(index.nodes.capacity(&format!("n{node}")), *capacity, "n{node}");
                }
            }
            if self.watches.iter().all(|watch| !watch.has_lost) {
                assert_eq!(index.nodes.len(), fresh.nodes.len(), "nodes that are gone leave the index");
            }
        }
    }

    proptest! {
        #[test]
        fn a_list_repairs_what_the_watch_has_lost_and_brings_nothing_back(
            steps in prop::collection::vec(steps(), 0..200),
        ) {
            let (mut index, mut world) = (index(), World::default());
            for step in steps {
                world.step(&mut index, step);
                for id in pod_ids() {
                    let uid = known(&index, id).map(|(uid, _)| uid);
                    prop_assert!(!uid.is_some_and(|uid| world.gone.contains(&uid)), "{:?} is back", id);
                }
            }
            world.finish(&mut index);
            world.expect_in(&index);
        }
    }
}

#[test]
fn an_invalid_field_keeps_the_last_valid_value_and_is_reported_once() {
    let mut index = index();
    apply_driver(&mut index, "d", json!({"workload/spot-ratio": "0.7", "workload/on-demand-base": "2"}));
    assert!(index.take_invalid_annotations(usize::MAX).is_empty());
    for _ in 0..3 {
        apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
    }
    assert_eq!(policy(&index), Some(("0.7".into(), 4)));
    apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "5"}));
    let reported = index.take_invalid_annotations(usize::MAX);
    let [annotation] = reported.as_slice() else { panic!("{reported:?}") };
    assert_eq!(annotation.fallback(&annotation.invalid[0]), "still using 0.7");
    apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "x"}));
    let reported = index.take_invalid_annotations(usize::MAX);
    assert!(
        matches!(reported.as_slice(), [InvalidAnnotation { invalid, .. }] if matches!(invalid.as_slice(), [InvalidField { field: PolicyField::OnDemandBase, .. }])),
        "{reported:?}"
    );
    apply_driver(&mut index, "d", json!({"workload/on-demand-base": "4"}));
    assert_eq!(policy(&index), Some(("0.5".into(), 4)));
}

#[test]
fn a_field_that_was_never_valid_is_left_to_the_ledger() {
    let mut index = index();
    apply_driver(&mut index, "d", json!({"workload/spot-ratio": "seven", "workload/on-demand-base": "4"}));
    assert_eq!(
        desired(&index, &job()).overrides,
        PolicyOverrides { spot_ratio: None, ..PolicyOverrides::from(Policy { on_demand_base: 4, ..Policy::DEFAULT }) }
    );
    let reported = index.take_invalid_annotations(usize::MAX);
    assert_eq!(reported[0].fallback(&reported[0].invalid[0]), "using the last valid value, or else the default");
}

fn changed(index: &mut ClusterIndex) -> Vec<Change> {
    index.take_changed().into_values().map(|changes| changes.change).collect()
}

#[test]
fn only_real_changes_are_reported_and_a_loss_is_the_most_urgent() {
    let mut index = index();
    apply(&mut index, "e", "executor", |_| {});
    assert_eq!(changed(&mut index), [Change::Other]);
    apply(&mut index, "e", "executor", |_| {});
    assert_eq!(changed(&mut index), []);
    apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
    assert_eq!(changed(&mut index), [Change::Other]);
    index.apply_node("n", Some(Capacity::Spot));
    assert_eq!(changed(&mut index), [Change::Other]);
    index.delete_pod("etl", "e");
    apply(&mut index, "e2", "executor", |_| {});
    assert_eq!(changed(&mut index), [Change::Loss]);
    apply(&mut index, "e2", "driver", |_| {});
    assert_eq!(changed(&mut index), [Change::Loss], "a pod that is no executor any more");
    apply(&mut index, "e2", "executor", |_| {});
    assert_eq!(changed(&mut index), [Change::Other]);
}

#[test]
fn the_capacity_of_a_node_that_is_gone_is_remembered_when_an_annotation_is_edited() {
    let mut index = index();
    index.apply_node("n", Some(Capacity::Spot));
    let bound = |pod: &mut Value| pod["spec"]["nodeName"] = json!("n");
    apply(&mut index, "e", "executor", bound);
    index.delete_node("n");
    apply(&mut index, "e", "executor", |pod| {
        bound(pod);
        pod["metadata"]["annotations"] = json!({"workload/capacity-type": "on-demand"});
    });
    assert_eq!((capacities(&index), index.nodes.len()), (vec![Some(Capacity::Spot)], 1));
}

#[test]
fn a_pod_that_moves_to_another_job_or_node_leaves_the_former_one() {
    let mut index = index();
    index.apply_node("n2", Some(Capacity::Spot));
    apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n"));
    apply(&mut index, "e", "executor", |pod| pod["spec"]["nodeName"] = json!("n2"));
    assert_eq!((capacities(&index), index.nodes.len()), (vec![Some(Capacity::Spot)], 1));
    apply(&mut index, "e", "executor", |pod| pod["metadata"]["labels"]["spark-app-selector"] = json!("k"));
    assert!(!index.contains(&job()) && index.jobs().count() == 1);
}
