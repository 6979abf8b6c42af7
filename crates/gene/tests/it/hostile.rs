//! `gene.json` and the files beside it, edited by somebody else.

use std::fs;
use std::os::unix::fs::symlink;

use checkpoint::CheckpointError;
use gene::{Gene, GeneError};
use serde_json::{Value, json};

use crate::support::*;

/// Opens a gene after `edit` changed its manifest.
#[track_caller]
fn refuse(edit: impl FnOnce(&mut Value)) -> GeneError {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let path = gene.dir().join("gene.json");
    let mut text = read_json(&path);
    edit(&mut text);
    fs::write(&path, text.to_string()).unwrap();
    Gene::open(gene.dir()).unwrap_err()
}

#[track_caller]
fn inconsistent(name: &str, edit: impl FnOnce(&mut Value)) -> String {
    match refuse(edit) {
        GeneError::Inconsistent { name: found, problem, .. } => {
            assert_eq!(found, name);
            problem
        }
        other => panic!("{other:?}"),
    }
}

/// Position of a module in the manifest's list.
fn at(text: &Value, name: &str) -> usize {
    text["modules"].as_array().unwrap().iter().position(|module| module["name"] == name).unwrap()
}

#[test]
fn manifest_that_is_no_manifest() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    for text in ["", "[]", "{}", "null", "{\"schema\":1}", &"[".repeat(100_000), "\u{1}"] {
        fs::write(gene.dir().join("gene.json"), text).unwrap();
        let error = Gene::open(gene.dir()).unwrap_err();
        assert!(matches!(error, GeneError::Json { .. }), "{error:?}");
        assert!(!error.to_string().chars().any(char::is_control));
    }
}

#[test]
fn manifest_that_is_missing_or_of_a_later_schema() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    fs::write(gene.dir().join("gene.json"), "{\"schema\":2}").unwrap();
    assert!(matches!(Gene::open(gene.dir()), Err(GeneError::Schema { found: 2, read: 1, .. })));
    fs::remove_file(gene.dir().join("gene.json")).unwrap();
    assert!(matches!(Gene::open(gene.dir()), Err(GeneError::NotAGene { .. })));
}

#[test]
fn manifest_that_is_a_link_out_of_the_folder() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    fs::rename(gene.dir().join("gene.json"), bench.path("outside.json")).unwrap();
    symlink("../outside.json", gene.dir().join("gene.json")).unwrap();
    assert!(matches!(Gene::open(gene.dir()), Err(GeneError::Checkpoint(CheckpointError::LinkOut { .. }))));
}

#[test]
fn module_that_claims_another_layer() {
    // With another layer's coefficient it could be switched on or off behind the user's back.
    inconsistent(Q0, |text| {
        let n = at(text, Q0);
        text["modules"][n]["layer"] = json!(1);
    });
}

#[test]
fn module_that_is_no_linear_module_of_a_layer() {
    inconsistent("lm_head", |text| {
        let n = at(text, UP0);
        text["modules"][n]["name"] = json!("lm_head");
    });
}

#[test]
fn module_listed_twice() {
    inconsistent(Q0, |text| {
        let copy = text["modules"][at(text, Q0)].clone();
        text["modules"].as_array_mut().unwrap().push(copy);
    });
}

#[test]
fn module_whose_shape_or_rank_is_not_that_of_its_factors() {
    for (key, value) in
        [("shape", json!([6, 4])), ("shape", json!([4, 7])), ("rank", json!(2)), ("rank", json!(0))]
    {
        inconsistent(Q0, |text| {
            let n = at(text, Q0);
            text["modules"][n][key] = value;
        });
    }
}

#[test]
fn module_announced_without_factors_or_stored_without_announcement() {
    let problem = inconsistent(UP0, |text| {
        let n = at(text, UP0);
        text["modules"][n]["class"] = json!("low-rank");
        text["modules"][n]["rank"] = json!(2);
    });
    assert_eq!(problem, "has no factors");
    let problem = inconsistent(Q0, |text| {
        let n = at(text, Q0);
        text["modules"].as_array_mut().unwrap().remove(n);
    });
    assert_eq!(problem, "has factors but is not listed");
    let problem = inconsistent(Q0, |text| {
        let n = at(text, Q0);
        text["modules"][n]["class"] = json!("unchanged");
        text["modules"][n]["rank"] = json!(0);
    });
    assert_eq!(problem, "has factors that are not announced");
}

#[test]
fn shares_and_energies_below_zero() {
    for key in ["energy", "residual", "noise_floor"] {
        inconsistent(Q0, |text| {
            let n = at(text, Q0);
            text["modules"][n][key] = json!(-0.5);
        });
    }
    inconsistent(NORM1, |text| text["rest"][1]["energy"] = json!(-1));
}

#[test]
fn scale_other_than_one() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let path = gene.dir().join("adapter_config.json");
    let mut config = read_json(&path);
    config["lora_alpha"] = json!(300);
    fs::write(&path, config.to_string()).unwrap();
    match Gene::open(gene.dir()) {
        Err(GeneError::Inconsistent { name, problem, .. }) => {
            assert_eq!((name.as_str(), problem.as_str()), (Q0, "has scale 100 instead of 1"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn classes_that_do_not_add_up() {
    inconsistent("classes", |text| text["classes"]["low-rank"] = json!(3));
    assert!(matches!(refuse(|text| text["classes"]["unheard-of"] = json!(1)), GeneError::Json { .. }));
}

#[test]
fn rest_that_is_missing_or_of_another_shape() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    fs::remove_file(gene.dir().join("rest.safetensors")).unwrap();
    assert!(matches!(Gene::open(gene.dir()), Err(GeneError::Inconsistent { .. })));
    inconsistent(NORM1, |text| text["rest"][1]["shape"] = json!([7]));
    inconsistent(EMBED, |text| text["rest"][0]["shape"] = json!([8, 7]));
    inconsistent(EMBED, |text| text["rest"][0]["shape"] = json!([1, 6]));
    inconsistent(EMBED, |text| text["rest"][0]["class"] = json!("full"));
    inconsistent(NORM1, |text| text["rest"][1]["class"] = json!("low-rank"));
    inconsistent(NORM1, |text| text["rest"][1]["layer"] = json!(0));
    inconsistent(NORM1, |text| text["rest"][1]["layer"] = Value::Null);
}

#[test]
fn rest_that_is_stored_but_not_listed() {
    let problem = inconsistent(NORM1, |text| {
        text["rest"].as_array_mut().unwrap().remove(1);
        text["classes"].as_object_mut().unwrap().remove("full");
    });
    assert_eq!(problem, "is stored in the rest but not listed");
}

#[test]
fn weight_that_is_low_rank_and_full_at_once() {
    let bench = Bench::new();
    let gene = bench.save_plain_gene("gene");
    let weight = format!("{Q0}.weight");
    save(gene.dir(), "rest.safetensors", &[tensor(&weight, &Q_SHAPE, 0.0)]);
    let path = gene.dir().join("gene.json");
    let mut text = read_json(&path);
    text["rest"] = json!([{"name": weight, "layer": 0, "shape": Q_SHAPE, "class": "full", "energy": 1.0}]);
    text["classes"]["full"] = json!(1);
    fs::write(&path, text.to_string()).unwrap();
    assert!(matches!(Gene::open(gene.dir()), Err(GeneError::Inconsistent { name, .. }) if name == weight));
}

#[test]
fn row_numbers_that_are_wrong_are_found_when_read() {
    for rows in [[7u64, 1], [1, 1], [1, 8], [1, u64::MAX]] {
        let bench = Bench::new();
        let gene = bench.save_gene("gene");
        let path = gene.dir().join("rest.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        // The widest dtype comes first: the row numbers start the data.
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes[start..start + 16], [1u64, 7].map(u64::to_le_bytes).concat());
        bytes[start..start + 16].copy_from_slice(&rows.map(u64::to_le_bytes).concat());
        fs::write(&path, &bytes).unwrap();
        let gene = Gene::open(gene.dir()).unwrap();
        assert!(matches!(gene.rest_delta(EMBED), Err(GeneError::Inconsistent { .. })), "{rows:?}");
    }
}

#[test]
fn nan_in_the_rest_or_in_a_factor_is_named() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    for (file, value) in [("rest.safetensors", 1.75f32), ("adapter_model.safetensors", 0.5)] {
        let path = gene.dir().join(file);
        let mut bytes = fs::read(&path).unwrap();
        let place = bytes.windows(4).rposition(|four| four == value.to_le_bytes()).unwrap();
        bytes[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
    }
    let gene = Gene::open(gene.dir()).unwrap();
    let rest = [NORM1, EMBED].map(|name| gene.rest_delta(name));
    assert_eq!(rest.iter().filter(|result| matches!(result, Err(GeneError::NonFinite { .. }))).count(), 1);
    let factors = [Q0, UP1].map(|name| gene.factors(name));
    let named = |error: &GeneError| error.to_string().contains("lora_");
    assert_eq!(factors.iter().filter(|result| result.as_ref().is_err_and(named)).count(), 1);
}

#[test]
fn many_modules_are_opened_and_found_by_name_in_no_time() {
    let bench = Bench::new();
    let gene = bench.save_gene("gene");
    let path = gene.dir().join("gene.json");
    let mut text = read_json(&path);
    let count = 40_000;
    let name = |n: usize| format!("model.layers.0.mlp.experts.{n}.gate_proj");
    for n in 0..count {
        let entry = json!({"name": name(n), "layer": 0, "shape": [8, 8], "class": "left-out"});
        text["modules"].as_array_mut().unwrap().push(entry);
        let name = format!("{}.weight", name(n));
        let entry = json!({"name": name, "layer": 0, "shape": [8, 8], "class": "left-out", "energy": 0});
        text["rest"].as_array_mut().unwrap().push(entry);
    }
    fs::write(&path, text.to_string()).unwrap();
    let start = std::time::Instant::now();
    let gene = Gene::open(gene.dir()).unwrap();
    for n in 0..count {
        assert_eq!(gene.module(&name(n)).unwrap().name, name(n));
        assert!(matches!(gene.rest_delta(&format!("{}.weight", name(n))), Err(GeneError::NoRest { .. })));
    }
    // By a search through the lists it took 9 s to open and as long to look up; it is less than one for both.
    assert!(start.elapsed().as_secs_f64() < 9.0, "{:?}", start.elapsed());
}

#[test]
fn control_characters_in_names_are_escaped() {
    let error = refuse(|text| {
        let n = at(text, UP0);
        text["modules"][n]["name"] = json!("model.layers.0.\u{1b}[2J");
        text["modules"][n]["layer"] = json!(4);
    });
    let message = error.to_string();
    assert!(message.contains("\\u{1b}[2J") && !message.chars().any(char::is_control), "{message}");
}
