# shellcheck shell=bash
# What the two front scripts must know of the pytest arguments that they pass on; to be sourced.

# asks_for_help ARGS...: true when the script's own help is wanted.
asks_for_help() {
    local arg
    for arg; do
        case $arg in
            -h | --help) return 0 ;;
        esac
    done
    return 1
}

# names_target FOLDER ARGS...: true when a file, folder or test id under FOLDER is among them.
names_target() {
    local folder=$1 arg
    shift
    for arg; do
        case $arg in
            -* | *.json | *.xml) ;;
            "$folder" | "$folder"/* | "./$folder" | "./$folder"/* | *.py | *.py::*) return 0 ;;
        esac
    done
    return 1
}

# option_value --NAME ARGS...: prints the last value given as --NAME=VALUE or --NAME VALUE.
option_value() {
    local name=$1 value='' previous='' arg
    shift
    for arg; do
        if [ "$previous" = "$name" ]; then
            value=$arg
        fi
        case $arg in
            "$name="*) value=${arg#"$name="} ;;
        esac
        previous=$arg
    done
    printf '%s\n' "$value"
}

# chooses_workers ARGS...: true when they say how to spread tests over processes.
chooses_workers() {
    local arg
    for arg; do
        case $arg in
            -n | -n[0-9]* | -nauto | -nlogical | --numprocesses | --numprocesses=* | --dist | --dist=* | no:xdist | -pno:xdist) return 0 ;;
        esac
    done
    return 1
}
