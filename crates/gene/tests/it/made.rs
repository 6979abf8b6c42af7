//! Genes from factors that were trained, and genes of which only some layers were kept.

use crate::support::{Bench, Q_SHAPE, Q0, UP_SHAPE, UP1};
use gene::{
    Class, Gene, GeneError, LayerEntry, MadeFactors, Origin, Source, Sources, write_made, write_selected,
};
use serde_json::{Map, json};

fn origin() -> Origin {
    let source = |name: &str| Source { name: name.into(), content: "blake3:0".into(), ..Source::default() };
    Origin {
        tool: "0.0.0".into(),
        options: Map::new(),
        sources: Sources { aligned: source("a"), degraded: source("d"), ..Sources::default() },
        extra: [("distilled".to_string(), json!({"end": 0.5}))].into_iter().collect(),
    }
}

fn factors(module: &str, [rows, cols]: [u64; 2], scale: f32) -> MadeFactors {
    let (rank, rows, cols) = (2, rows as usize, cols as usize);
    let value = |i: usize| scale * ((i * 7 + 3) % 11) as f32 - 0.4;
    MadeFactors {
        module: module.into(),
        rank,
        b: (0..rows * rank).map(value).collect(),
        a: (0..rank * cols).map(|i| value(i + 5)).collect(),
    }
}

/// ‖BA‖² the long way.
fn energy(f: &MadeFactors) -> f64 {
    let cols = f.a.len() / f.rank;
    let mut sum = 0.0;
    for row in f.b.chunks(f.rank) {
        for c in 0..cols {
            let x: f64 = (0..f.rank).map(|k| f64::from(row[k]) * f64::from(f.a[k * cols + c])).sum();
            sum += x * x;
        }
    }
    sum
}

#[test]
fn made_gene_is_read_back_with_the_energy_of_its_factors() {
    let models = Bench::new();
    let base = models.model();
    let all = [factors(Q0, Q_SHAPE, 0.1), factors(UP1, UP_SHAPE, 0.3)];
    let want: f64 = all.iter().map(energy).sum();
    let out = models.path("made");
    write_made(&out, false, &base, all.to_vec(), origin()).unwrap();
    let gene = Gene::open(&out).unwrap();
    assert!((gene.manifest().energy - want).abs() <= 1e-9 * want);
    assert_eq!((gene.manifest().captured, gene.layers()), (1.0, vec![0, 1]));
    assert_eq!(gene.manifest().extra["distilled"]["end"], 0.5);
    for f in &all {
        let found = gene.factors(&f.module).unwrap();
        assert_eq!((&found.b, &found.a, found.rank, found.scale), (&f.b, &f.a, 2, 1.0));
    }
    gene::check_family(&gene, &base).unwrap();
    // Every tensor of the base is counted once.
    let n: u64 = gene.manifest().classes.values().sum();
    assert_eq!(n as usize, base.units().unwrap().len());
}

#[test]
fn module_that_the_base_does_not_have_is_refused_by_name() {
    let models = Bench::new();
    let base = models.model();
    let bad = factors("model.layers.9.self_attn.q_proj", [4, 4], 0.1);
    let error = write_made(&models.path("bad"), false, &base, vec![bad], origin()).unwrap_err();
    assert!(error.to_string().contains("model.layers.9.self_attn.q_proj"), "{error}");
    assert!(!models.path("bad").exists());
}

#[test]
fn layers_that_were_not_chosen_are_left_out_and_their_energy_is_lost() {
    let models = Bench::new();
    let base = models.model();
    let all = [factors(Q0, Q_SHAPE, 0.1), factors(UP1, UP_SHAPE, 0.3)];
    let energies = all.each_ref().map(energy);
    let whole = models.path("whole");
    write_made(&whole, false, &base, all.to_vec(), origin()).unwrap();
    let gene = Gene::open(&whole).unwrap();
    let layer =
        |layer, score, selected| LayerEntry { layer, score: Some(score), selected, extra: Map::new() };
    let layers = vec![layer(0, 0.25, false), layer(1, 2.0, true)];
    let some = models.path("some");
    write_selected(&some, false, &gene, layers.clone(), Map::new()).unwrap();
    let part = Gene::open(&some).unwrap();
    assert_eq!(part.layers(), [1]);
    assert_eq!(part.manifest().layers, layers);
    assert_eq!(part.module(Q0).unwrap().class, Class::LeftOut);
    assert!(matches!(part.factors(Q0), Err(GeneError::NoFactors { .. })));
    assert_eq!(part.factors(UP1).unwrap().b, all[1].b);
    let want = energies[1] / (energies[0] + energies[1]);
    assert!((part.manifest().captured - want).abs() < 1e-9, "{} {want}", part.manifest().captured);
    let sum = |g: &Gene| g.manifest().classes.values().sum::<u64>();
    assert_eq!(sum(&part), sum(&gene));
    assert_ne!(part.content(), gene.content());
    gene::check_family(&part, &base).unwrap();
}
