//! The cost of the pure part of an admission: decoding a real review, deciding, and encoding the reply.

use balancer_core::{
    Action, Capacity, CapacityLabels, CapacityProfile, Conventions, Counts, Policy, Reply, Review, Spread, decide,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

/// A real review without white space, as apiservers send it.
fn wire() -> Vec<u8> {
    let fixture = include_bytes!("../../../tests/fixtures/k8s-1.36-spark-3.5-create-executor.json");
    serde_json::from_slice::<serde_json::Value>(fixture)
        .map(|review| review.to_string().into_bytes())
        .unwrap_or_default()
}

fn admission(c: &mut Criterion) {
    let wire = wire();
    let conventions = Conventions::default();
    let mut group = c.benchmark_group("admission");
    group.throughput(Throughput::Bytes(wire.len() as u64));
    group.bench_function("decode", |b| b.iter(|| Review::decode(black_box(&wire)).is_ok()));
    let to_reply = |conventions: &Conventions, capacity| {
        let Ok(review) = Review::decode(black_box(&wire)) else { return Vec::new() };
        let mut reply = Reply::allow(review.uid());
        if let Action::Place(executor) = Action::of(&review, conventions) {
            reply.patch = conventions.profile().apply(executor.pod, capacity, executor.placeholder, &Spread::default());
        }
        reply.encode()
    };
    group.bench_function("decode to reply", |b| b.iter(|| to_reply(&conventions, Capacity::OnDemand)));
    group.bench_function("decode to reply, spot preferred", |b| b.iter(|| to_reply(&conventions, Capacity::Spot)));
    let aks = Conventions { capacity_labels: CapacityLabels::of(CapacityProfile::Aks), ..Conventions::default() };
    group.bench_function("decode to reply, AKS on-demand", |b| b.iter(|| to_reply(&aks, Capacity::OnDemand)));
    group.bench_function("decode to reply, AKS spot preferred", |b| b.iter(|| to_reply(&aks, Capacity::Spot)));
    group.finish();
    let policy = Policy { on_demand_base: 2, ..Policy::DEFAULT };
    c.bench_function("decide", |b| {
        b.iter(|| decide(black_box(Counts { spot: 70_000, on_demand: 30_000 }), black_box(policy)));
    });
}

criterion_group!(benches, admission);
criterion_main!(benches);
